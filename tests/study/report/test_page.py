"""The two forms of a page."""

from html.parser import HTMLParser

from matplotlib.figure import Figure

from vqmoe_megatron.study.report.page import (
    Page,
    Plot,
    Section,
    Table,
    drawn_section,
    html_page,
    markdown,
)

PAGE = Page(
    "Study <x> & y",
    [("Rule", "equal | tokens")],
    [
        Section(
            "First",
            ["a < b"],
            [Plot("p.png", b"\x89PNG", "a plot", "what it shows")],
            [Table(["name", "loss"], [["a|b", "-1.5"], ["<i>", ""]], "below")],
        )
    ],
)


class Reader(HTMLParser):
    """Collects tags with their attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_html_is_whole_and_escaped():
    reader = Reader(html_page(PAGE))
    assert reader.open == []
    for text in ("Study <x> & y", "a < b", "what it shows", "equal | tokens", "<i>", "below"):
        assert text in reader.text
    assert "i" not in {tag for tag, _ in reader.tags}
    (image,) = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert image == {"alt": "a plot", "src": "data:image/png;base64,iVBORw=="}


def test_numbers_stand_to_the_right():
    cells = [attributes for tag, attributes in Reader(html_page(PAGE)).tags if tag == "td"]
    assert [cell.get("class") for cell in cells] == [None, "right", None, "right"]


def test_html_follows_light_and_dark():
    assert "prefers-color-scheme: dark" in html_page(PAGE)


def test_markdown_links_the_plot_and_keeps_the_table():
    text = markdown(PAGE)
    assert "![a plot](p.png)\n\n*what it shows*" in text
    assert "| name | loss |\n| --- | ---: |\n| a\\|b | -1.5 |\n| <i> |  |" in text
    assert text.startswith("# Study <x> & y\n\n- Rule: equal | tokens\n\n## First")


def test_a_markdown_row_is_one_line_with_its_bars_escaped():
    table = Table(["axis|x", "reason"], [["1", "first\nsecond | third"]], "")
    text = markdown(Page("P", [], [Section("S", tables=[table])]))
    assert "| axis\\|x | reason |\n| ---: | --- |\n| 1 | first second \\| third |\n" in text


def test_a_drawing_is_a_png_and_a_reason_a_sentence():
    drawings = [("p.png", Figure(), "What it is. More."), ("q.png", "nothing ran", "")]
    section = drawn_section("S", drawings, ["a text"])
    (plot,) = section.plots
    assert plot.png.startswith(b"\x89PNG")
    assert (plot.file_name, plot.alt, plot.caption) == ("p.png", "What it is", "What it is. More.")
    assert section.paragraphs == ["No plot q.png: nothing ran.", "a text"]
