"""The two checks that configuration sections share."""

from __future__ import annotations


def check_choice(section: str, name: str, value: object, legal: tuple[str, ...]) -> None:
    """Raise ``ValueError`` naming the legal values when ``value`` is not one of them."""
    if value not in legal:
        raise ValueError(
            f"{section}.{name}={value!r} is not legal; choose one of {', '.join(legal)}"
        )


def check_at_least(section: str, minimum: float, **values: float | None) -> None:
    """Raise ``ValueError`` for each given value below ``minimum`` (``None`` means unset)."""
    for name, value in values.items():
        if value is not None and not value >= minimum:
            raise ValueError(f"{section}.{name}={value} must be at least {minimum}")
