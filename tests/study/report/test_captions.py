"""Words and plots that sections share."""

from matplotlib.figure import Figure

from vqmoe_megatron.study.report.captions import plot_or_reason, seeds_of
from vqmoe_megatron.study.report.intervals import seed_means


def test_seeds_are_a_number_or_a_range():
    assert seeds_of(seed_means([[1.0, 2.0], [3.0, 4.0]])) == "n = 2"
    assert seeds_of(seed_means([[1.0], [3.0, 4.0, 5.0]])) == "n = 1 to 3"
    assert seeds_of([]) == "none measured"


def test_a_drawing_is_a_png_and_a_reason_a_sentence():
    (plot,), said = plot_or_reason("p.png", Figure(), "What it is. More.")
    assert plot.png.startswith(b"\x89PNG") and said == []
    assert (plot.file_name, plot.alt, plot.caption) == ("p.png", "What it is", "What it is. More.")
    assert plot_or_reason("p.png", "nothing ran", "") == ([], ["No plot p.png: nothing ran."])
