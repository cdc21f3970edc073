"""The notebooks run in a real kernel with small settings; what is kept in them is small and clean."""

import copy
from pathlib import Path

import datasets
import pytest
import torch

pytest.importorskip("ipykernel")
nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CLASSES = ["T - shirt / top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def parameters(**values):
    """A cell that sets parameters, to follow those of the notebook."""
    return nbformat.v4.new_code_cell("\n".join(f"{name} = {value!r}" for name, value in values.items()))


def read(name: str, **values):
    """A notebook without its kept outputs, with values laid over its parameters."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    place = next(n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    notebook.cells.insert(place + 1, parameters(**values))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    return notebook


def run(notebook) -> list:
    """All outputs of the notebook, run where it lies."""
    where = {"metadata": {"path": str(ROOT / "notebooks")}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def shown(outputs: list, kind: str) -> list[str]:
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


def printed(outputs: list) -> str:
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


@pytest.fixture
def fashion(tmp_path):
    """Random images in the form of Fashion-MNIST."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    for seed, split in enumerate(("train", "test")):
        pixels = torch.randint(256, (40, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        table = datasets.Dataset.from_dict(
            {"image": list(pixels.numpy()), "label": [n % 10 for n in range(40)]}, features
        )
        table.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    return tmp_path


def test_fashion_mnist(fashion):
    small = dict(RUNS=str(fashion / "runs"), IMAGE_SIZE=14, TEACHER_STEPS=2, STUDENT_STEPS=2, EVALUATED=20)
    notebook = read("fashion_mnist", DATA=str(fashion / "nowhere"), **small)
    place = next(n for n, cell in enumerate(notebook.cells) if "images = load_images(" in cell.source)
    without = copy.deepcopy(notebook.cells[place])
    without.metadata["tags"], without.id = ["raises-exception"], "without-data"
    notebook.cells[place:place] = [without, parameters(DATA=str(fashion))]

    outputs = run(notebook)
    (error,) = without.outputs
    (sentence,) = error.traceback
    assert sentence.startswith("error: ")
    assert "nowhere" in sentence
    assert "Traceback" not in sentence
    text = printed(outputs)
    assert "40 images of 14 × 14 pixels, 10 classes" in text
    for name in ("teacher", "student"):
        assert f"Finished 2 iterations: the pipeline is in {fashion / 'runs' / name}." in text
        assert (fashion / "runs" / name / "model_index.json").is_file()
    assert len(shown(outputs, "image/png")) == 5
    own, finished = shown(outputs, "text/markdown")
    assert "| student, 1 step | 1 |" in own
    assert "| teacher, 20 steps | 20 |" in own
    assert "label accuracy" in finished  # of the judge


def test_sit_imagenet(tmp_path):
    notebook = read("sit_imagenet", CHECKPOINT=str(tmp_path / "SiT-XL-2-256.pt"), RUNS=str(tmp_path), STEPS=2)
    outputs = run(notebook)
    first, second, _ = shown(outputs, "text/markdown")
    assert "is not here.** Download it" in first
    assert "**No student is named**" in second
    text = printed(outputs)
    assert "found:    SiT teacher" in text
    assert "674,834,720 parameters" in text  # the dry run of the real one
    assert "4 evaluations for each of 4 images" in text
    assert "1 evaluation for each of 4 images" in text
    assert len(shown(outputs, "image/png")) == 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_kept_outputs_are_of_a_run_without_errors_and_name_no_place(path):
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert shown(outputs, "image/png")
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert "stderr" not in {output.get("name") for output in outputs}
    text = printed(outputs) + "".join(shown(outputs, "text/markdown"))
    assert not [place for place in ("/root/", "/home/", "/tmp/", "/content/") if place in text]
    assert sum(each.stat().st_size for each in NOTEBOOKS) < 1_500_000
