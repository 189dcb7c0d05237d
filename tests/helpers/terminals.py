"""A stand-in for a terminal."""

import io


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def screen(self) -> list[str]:
        """What a person sees: `\\r` goes back, an erased line is empty."""
        lines = [""]
        for part in self.getvalue().replace("\r\x1b[K", "\0").split("\n"):
            lines[-1] = part.rpartition("\0")[2] if "\0" in part else lines[-1] + part
            lines.append("")
        return lines[:-1]
