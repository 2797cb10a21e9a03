"""How answers are written in `chat.py`; without torch, so that a command line is checked before it is loaded."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How answers are written.

    thinking: whether the model thinks before it answers, if its template knows that.
    temperature: of sampling; 0 takes the likeliest token.
    top_p: sample among the likeliest tokens that have this probability together.
    top_k: sample among this many likeliest tokens; 0 is no limit.
    min_p: sample among tokens with at least this share of the likeliest one's probability; 0 is no limit.
    repetition_penalty: divides the scores of tokens that occurred, in the prompt or the answer; 1 changes nothing.
    max_new_tokens: of one answer, thinking included.
    """

    thinking: bool = False
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 1024

    def __post_init__(self):
        if not isinstance(self.thinking, bool):
            raise ValueError(f"thinking is {self.thinking!r}; it must be true or false")
        _check_number("temperature", self.temperature, 0, 100)
        _check_number("top_p", self.top_p, 1e-6, 1)
        _check_number("min_p", self.min_p, 0, 1)
        _check_number("repetition_penalty", self.repetition_penalty, 1e-2, 100)
        for name, minimum in (("top_k", 0), ("max_new_tokens", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} is {value!r}; it must be a whole number")
            _check_number(name, value, minimum, 2**31 - 1)


def _check_number(name: str, value: object, minimum: float, maximum: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not minimum <= value <= maximum:
        raise ValueError(f"{name} is {value!r}; it must be a number from {minimum:g} to {maximum:g}")
