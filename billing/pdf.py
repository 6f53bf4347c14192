"""What our PDFs share. Pure Python; the fonts are vendored, so that any name can be printed."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

from fpdf import FPDF

FONTS = Path(__file__).parent / "fonts" / "dejavu-2.37.3"
GREY, BLACK, RULE = (95, 99, 104), (20, 22, 26), (210, 212, 216)
MARGIN_MM = 20


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
        self.cell(50, 8, label)
        self.set_font("DejaVu", style, 10)
        self.set_text_color(*BLACK)
        self.multi_cell(0, 8, value, align=align, new_x="LMARGIN", new_y="NEXT")

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
