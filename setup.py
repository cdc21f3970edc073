"""Plain setuptools: `pip install .` from PyPI gives a working installation with and without a GPU."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
INIT = (HERE / "src" / "si_distill" / "__init__.py").read_text(encoding="utf-8")

setup(
    name="si_distill",
    version=re.search(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)[1],
    description="One-step students of diffusion, flow and bridge models, for the Hugging Face ecosystem",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"si_distill": ["py.typed", "hub/model_cards/*"]},
    # The lower bounds are versions that the test suite ran on or that the design was tried on. torch and torchvision are
    # resolved together by pip; never mix a "+cpu" torch with PyPI's torchvision (it fails to import and takes diffusers
    # and transformers down with it).
    install_requires=[
        "torch>=2.11",
        "torchvision",
        "accelerate>=1.15",
        "diffusers>=0.42.1",
        "transformers>=5.17",
        "datasets>=5.0",
        "huggingface-hub>=1.33",
        "jinja2>=3.1",
        "safetensors>=0.8",
        "torch-fidelity>=0.4.0",
        "wandb>=0.20",
        "pillow>=10.0",
        "numpy>=1.26",
        "scipy>=1.11",
        "pyyaml>=6.0",
        "xxhash>=3.0",
        "tqdm>=4.66",
        "matplotlib>=3.8",
    ],
    extras_require={
        "demo": ["scikit-learn>=1.4"],
        "space": ["gradio>=6.0"],
        "space-test": ["playwright>=1.50"],
        "dev": ["scikit-learn>=1.4", "pytest>=8.0", "pytest-xdist>=3.5", "hypothesis>=6.100", "ruff>=0.9"],
    },
)
