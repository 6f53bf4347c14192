"""What a function says when it does not do what it was asked for."""

from typing import ClassVar


class Refusal(Exception):
    """`message` is for the person who asked, `http_status` for what answers them."""

    http_status: ClassVar[int] = 400

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
