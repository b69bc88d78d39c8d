"""BackPACK's global state, of which nothing is needed here."""


class CTX:
    """What programs use of BackPACK's class of this name."""

    @staticmethod
    def remove_hooks() -> None:
        """Without effect: blocks remove their hooks when they end."""
