"""Text that people typed or put into an address, which may hold anything."""


def read_id(text: str) -> int | None:
    """A row's id in digits; None where the text is none, or more than a column could hold."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


def one_line(text: str) -> str:
    """On one line, without what cannot be printed, nor stored in PostgreSQL."""
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())
