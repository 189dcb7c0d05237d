"""Meshes to training data: what `examples/prepare_data.py` does with its options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

from ..common import shared_options as shared
from ..common.options import Old, option
from ..common.terminal import say, tell
from ..data_prep.options import PrepareSettings


@dataclass(frozen=True)
class PrepareOptions(PrepareSettings):
    """Turn a folder of meshes into training data: pictures, instance masks and surface points."""

    old_spellings: ClassVar[Sequence[Old]] = (
        Old("no_singles", bool, "is spelt --no-singles now", lambda value: {"singles": not value}),
    )

    input_dir: str | None = option(None, "loose mesh files and/or one subfolder per scene")
    recursive: bool = option(False, "scenes at any depth of folders, named by their path: a/b/x.glb is scene a_b")
    output_dir: str | None = option(None, "where the samples go; complete samples there are kept")
    check: str | None = option(
        None, "report on the training data in this folder; nothing is prepared or changed", reads=True
    )
    contact_sheet: str | None = option(
        "outputs/contact_sheet.png",
        "with --check: a picture of samples, mask outlines and surface points to look at; none draws none",
        writes=True,
    )
    front3d_list: str | None = shared.front3d_list()
    overwrite: bool = option(False, "make samples again that are complete already (only our own files)")
    num_workers: int | None = option(
        None, "processes (default: one per core); the result does not depend on it", least=1
    )

    def check_together(self) -> None:
        """Raise ValueError where options that are fine alone do not fit each other."""
        super().check_together()
        for name in ("input_dir", "output_dir"):
            if self.check is None and getattr(self, name) is None:
                raise ValueError(f"{name} is missing: pass --input_dir and --output_dir, or --check DIR")
        if self.check is None and self.front3d_list is not None:
            raise ValueError("front3d_list is given without check, so it would do nothing: pass --check DIR, too")

    def settings(self) -> PrepareSettings:
        """What decides what a sample holds, without folders and processes."""
        return PrepareSettings(**{entry.name: getattr(self, entry.name) for entry in fields(PrepareSettings)})


def run(options: PrepareOptions) -> int:
    """Prepare, or check; returns 0 when nothing was skipped and nothing is wrong, else 1.

    Raises:
        ValueError: the folders can't be used.
        OutputError: the output can't be written.
    """
    if options.check is not None:
        return check(options.check, options.front3d_list, options.contact_sheet)
    from ..data_prep.prepare import prepare

    outcome = prepare(
        options.input_dir,
        options.output_dir,
        options.settings(),
        options.overwrite,
        options.num_workers,
        recursive=options.recursive,
    )
    counts = f"{len(outcome.written)} written, {len(outcome.kept)} kept, {len(outcome.skipped)} skipped"
    if outcome.not_read:
        counts += f" ({outcome.not_read} of them files that are not read)"
    tell(f"{counts}: {options.output_dir}")
    if outcome.kept_with_other_settings:
        say(
            f"note: {len(outcome.kept_with_other_settings)} kept samples were made with other settings "
            f"(e.g. {outcome.kept_with_other_settings[0]}); --overwrite makes them again"
        )
    return 1 if outcome.skipped else 0


def check(data_dir: str, front3d_list: str | None = None, contact_sheet: str | None = None) -> int:
    """Print the report on a folder of training data, and draw samples where asked to; returns 1 when it found errors.

    Raises:
        ValueError: there is no data.
        OSError: the picture can't be written.
    """
    from ..data.check import check_data
    from ..data.contact_sheet import write_contact_sheet

    report = check_data(data_dir, front3d_list=front3d_list)
    tell(report.to_text())
    if contact_sheet is not None and report.scenes:
        shown = write_contact_sheet(report, contact_sheet)
        tell(f"contact sheet of {shown} of {len(report.scenes)} scenes: {contact_sheet}")
    return 1 if report.errors else 0
