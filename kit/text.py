"""Text that people typed or put into an address, which may hold anything."""


def read_id(text: str) -> int | None:
    """A row's id in digits; None where the text is not an id, or more than a column could hold."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


def one_line(text: str) -> str:
    """On one line, without what cannot be printed, nor stored in PostgreSQL."""
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())


def require_storable(text: str) -> str:
    """The text itself. Raises ValueError where PostgreSQL cannot store it: a NUL character or a lone surrogate."""
    if "\0" in text:
        raise ValueError("a NUL character is not allowed")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("a lone surrogate is not allowed") from None
    return text


def storable(text: str) -> str:
    """The text, without what PostgreSQL cannot store. Two halves of a character that came apart are one again."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").replace("\0", "")
