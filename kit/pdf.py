"""What our PDFs share: the page, and that whatever people are called can be read.

Most is set in the vendored DejaVu. What it lacks comes from Noto's fonts, each read when a text needs it and cut down
to the characters used. What none of them has, such as Chinese, is written in Latin letters ("李明" is "LiMing"), or by
its code: never as a blank.
"""

import re
import unicodedata
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from anyascii import anyascii
from fontTools.ttLib import TTFont
from fpdf import FPDF

FONTS = Path(__file__).parent / "fonts" / "dejavu-2.37.3"
NOTO = Path(str(files("manimgx_fonts")))
# Beyond these, letters join, stack or run from right to left, which takes the shaping engine, and more time.
NEEDS_SHAPING = re.compile("[^\x00-\u02ff\u0370-\u058f\u1e00-\u206f\u20a0-\u2bff]|[\u200b-\u200f\u202a-\u202e]")
# They have no shape of their own and belong to the character before them: a joiner, and what chooses its look.
JOINING = re.compile("[\u200c\u200d\ufe00-\ufe0f\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]")
# Order and width of the text are ours to decide: an author's marks for them could turn round what stands beside.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]")
GREY, BLACK, RULE = (95, 99, 104), (20, 22, 26), (210, 212, 216)
MARGIN_MM = 20


@cache
def _characters_of(path: Path) -> frozenset[int]:
    with TTFont(path, lazy=True) as font:
        return frozenset(font.getBestCmap())


@cache
def _font_with(character: str) -> Path | None:
    """The file that has the character, DejaVu's before all others."""
    if unicodedata.category(character) in ("Cc", "Cs", "Co", "Cn"):
        return None
    paths = [FONTS / "DejaVuSans.ttf", *sorted(NOTO.glob("*.ttf"))]
    return next((path for path in paths if ord(character) in _characters_of(path)), None)


def printable(text: str) -> str:
    """The text, with a stand-in for each character that no font of ours has."""
    return "".join(map(_printed, CONTROLS.sub("", unicodedata.normalize("NFC", text))))


@cache
def _printed(character: str) -> str:
    if character in "\n\t" or JOINING.match(character) or _font_with(character):
        return character
    return anyascii(character) or f"[U+{ord(character):04X}]"


class Document(FPDF):
    """An A4 page with our head and, on documents of several pages, their numbers."""

    def __init__(
        self,
        *,
        title: str,
        subtitle: str,
        written_at: datetime,
        orientation: Literal["portrait", "landscape"] = "portrait",
    ) -> None:
        super().__init__(format="A4", orientation=orientation)
        self.set_title(title)
        self.set_creation_date(written_at)
        self.add_font("DejaVu", "", FONTS / "DejaVuSans.ttf")
        self.add_font("DejaVu", "B", FONTS / "DejaVuSans-Bold.ttf")
        self.set_margin(MARGIN_MM)
        self.set_auto_page_break(auto=True, margin=MARGIN_MM)
        self.add_page()
        self.text_line("Postmate", size=20, style="B", height=12)
        self.text_line(subtitle, size=12, colour=GREY, height=14)

    def footer(self) -> None:
        if self.page_no() > 1:
            self.set_y(-15)
            self.set_font("DejaVu", "", 8)
            self.set_text_color(*GREY)
            self.cell(0, 5, f"{self.title}, page {self.page_no()} of {{nb}}", align="R")

    def multi_cell(self, w: float, h: float | None = None, text: str = "", *args: Any, **options: Any) -> Any:
        """fpdf2's, which every text goes through, those of tables as well: what is printed can be read."""
        text = printable(text)
        # Without the engine fpdf2 looks into one font alone.
        is_plain = not NEEDS_SHAPING.search(text) and _characters_of(FONTS / "DejaVuSans.ttf").issuperset(
            map(ord, text.replace("\n", ""))
        )
        self.set_text_shaping(use_shaping_engine=not is_plain)
        return super().multi_cell(w, h, text, *args, **options)

    def get_fallback_font(self, char: str, style: str = "") -> str | None:
        """fpdf2 asks for each character that DejaVu lacks."""
        path = _font_with(char)
        if path is None or path.parent == FONTS:
            return None
        family = path.stem.partition("[")[0].lower()
        if family not in self.fonts:
            self.add_font(family, "", path)
        return family

    def text_line(
        self, text: str, *, size: int, height: int, style: str = "", colour: tuple[int, int, int] = BLACK
    ) -> None:
        self.set_font("DejaVu", style, size)
        self.set_text_color(*colour)
        self.multi_cell(0, height, text, align="L", new_x="LMARGIN", new_y="NEXT")

    def fact(self, label: str, value: str, *, style: str = "", align: str = "L") -> None:
        """A row of two columns: what it is, and the value."""
        self.set_font("DejaVu", "", 10)
        self.set_text_color(*GREY)
        top = self.get_y()
        self.multi_cell(48, 8, label, align="L", new_x="LMARGIN", new_y="NEXT")
        bottom = self.get_y()
        if bottom > top:  # on the same page
            self.set_y(top)
        self.set_x(self.l_margin + 50)
        self.set_font("DejaVu", style, 10)
        self.set_text_color(*BLACK)
        self.multi_cell(0, 8, value, align=align, new_x="LMARGIN", new_y="NEXT")
        if self.get_y() > top:
            self.set_y(max(bottom, self.get_y()))

    def table_of(self, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table whose first column names the rows and whose other columns are numbers."""
        self.set_font("DejaVu", "", 8)
        self.set_text_color(*BLACK)
        self.set_draw_color(*RULE)
        with self.table(
            col_widths=(1.5, *[1] * (len(headers) - 1)),
            text_align=("LEFT", *["RIGHT"] * (len(headers) - 1)),
            borders_layout="HORIZONTAL_LINES",
            line_height=4.5,
            padding=(1, 1),
        ) as table:
            for row in (headers, *rows):
                table.row(row)

    def rule(self) -> None:
        self.ln(6)
        self.set_draw_color(*RULE)
        self.line(self.l_margin, self.get_y(), self.w - self.r_margin, self.get_y())
        self.ln(6)

    def small_print(self, text: str) -> None:
        self.ln(10)
        self.text_line(text, size=9, colour=GREY, height=5)
