"""Pictures: values, places and titles."""

import time

import torch
from PIL import Image, ImageDraw, ImageFont

from si_distill.visualization import LONGEST_TITLE, _shortened, image_grid, tensor_to_pil, to_uint8


def test_uint8_and_back_is_exact():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels)


def test_values_outside_are_cut_off():
    assert to_uint8(torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255]


def test_one_and_three_channels_become_pil_images():
    grey, colour = (tensor_to_pil(torch.zeros(2, channels, 4, 4))[0] for channels in (1, 3))
    assert (grey.mode, colour.mode) == ("L", "RGB")


def test_images_stand_in_their_rows_and_columns_enlarged_by_whole_pixels():
    tiles = [[Image.new("L", (8, 8), 10 * row + column) for column in range(3)] for row in range(2)]
    sheet = image_grid(tiles, min_cell=16)
    assert sheet.size == (4 + 3 * 20, 4 + 2 * 20)
    for row in range(2):
        for column in range(3):
            x, y = 4 + column * 20, 4 + row * 20
            assert sheet.crop((x, y, x + 16, y + 16)).getextrema() == ((10 * row + column,) * 2,) * 3


def test_a_title_of_several_lines_is_written_on_one():
    pictures = [[Image.new("L", (8, 8))]]
    grids = [image_grid(pictures, column_titles=[title]) for title in ("a\n# b", "a # b")]
    assert grids[0].tobytes() == grids[1].tobytes()


def test_titles_take_room_and_long_ones_are_cut():
    tiles = [[Image.new("L", (48, 48))] * 2]
    plain = image_grid(tiles)
    titled = image_grid(tiles, ["a row"], ["x", "a very long class name, with synonyms"])
    assert titled.width > plain.width
    assert titled.height > plain.height
    # Nothing of the long title runs past the last column.
    right = titled.crop((titled.width - 3, 0, titled.width, 20))
    assert right.getextrema() == ((255, 255),) * 3


def test_a_title_is_cut_to_what_fits_in_no_time_however_long_it_is():
    font, measure = ImageFont.load_default(size=14), ImageDraw.Draw(Image.new("L", (1, 1)))
    name = "great white shark, Carcharodon carcharias"
    for width in (1, 20, 72, 150, 1000):
        wanted = name
        while measure.textlength(wanted, font=font) > width and len(wanted) > 2:
            wanted = wanted.rstrip("…")[:-1] + "…"  # one character after the other
        assert _shortened(name, width, font, measure) == wanted
    start = time.process_time()
    assert len(_shortened("shark " * 10**5, 10**6, font, measure)) == LONGEST_TITLE + 1
    image_grid([[Image.new("L", (8, 8))] * 10], column_titles=["x" * 10**6] * 10)
    assert time.process_time() - start < 5
