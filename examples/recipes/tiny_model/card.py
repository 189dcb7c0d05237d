"""The model card, made from the json files in `results/`: no measured number is typed here.

What ships: the transformer and the image encoders of the fourth edition, which goes on from the second, and the VAE of
the first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from midilite.common.files import read_json

from .demo import MODELS, TRAINING, VALIDATION
from .quality import OBJECT_TAU, POINTS, SCENE_TAU
from .sampling_stage import KEYS, SHIPS
from .scenes import SETTINGS, STRETCH
from .stages import Plan
from .tuning_cells import RATES, SCENES, WHOLE_RATES, Cell
from .tuning_stage import CURVE, LEAST_SEEDS, choices, scatter, seeds_told, some_seeds

RESULTS = Path(__file__).parent / "results"
NAMES = ("tiny_model", "second_edition", "third_edition", "fourth_edition")
NAMES += ("speed", "speed_second_edition", "tuning", "tuning_second_edition", "demo")
GOALS = {"seen": (0.87, 0.62, 0.82), "unseen": (0.80, 0.56, 0.68)}  # scene F, box IoU, object F
NORMALS_GOAL, GAIN_GOAL, GAIN_SCENES = 0.95, 0.9, 64
MEASURES = (f"scene F-score({SCENE_TAU})", "box IoU", f"object F-score({SCENE_TAU})")
VARIANTS = (("rank 16", 16, 1e-3), ("rank 16", 16, 3e-3), ("rank 64", 64, 1e-3), ("all weights", 0, 3e-4))
BEFORE = "euler, 25 calls"  # a way of sampling
SEEN, UNSEEN = "seen furniture, unseen arrangements", "unseen furniture"

Results = Mapping[str, Any]


def read_results(folder: Path = RESULTS) -> dict[str, Any]:
    """The files that the card is made of, by name."""
    return {name: read_json(folder / f"{name}.json") for name in NAMES}


def model_card(results: Results, parameters: Mapping[str, int]) -> str:
    """The card as Markdown.

    Args:
        results: see `read_results`.
        parameters: of each network that ships.
    """
    sections = (_introduction(results, parameters), _data(results), _making(results), _scenes(results))
    sections += (_surfaces(results), _fast(results), _vehicles(results), _demo(results), LIMITS)
    return "\n\n".join(sections) + "\n"


def _introduction(results: Results, parameters: Mapping[str, int]) -> str:
    return f"""# The tiny model

A MIDI-3D model of {sum(parameters.values()) / 1e6:.1f} M parameters in the published folder layout (fp16), trained from
scratch for midilite and small enough for a CPU. It knows low-poly furniture and nothing else. Made by
`examples/recipes/tiny_model/run.py`, whose README is the log of what was tried; `run.py finish` writes this page from
the json files in `examples/recipes/tiny_model/results`.

Transformer and image encoders are those of the fourth edition, which went on from the second; the shape VAE is the
first edition's. What a third edition tried does not ship.

{_table("part", "parameters")}
{_rows((name, f"{count:,}") for name, count in parameters.items())}"""


def _data(results: Results) -> str:
    first = results["tiny_model"]
    low, high = SETTINGS.elevation_range
    return f"""## Data and licence

Trained on 3D models by **Kenney** (kenney.nl), released under CC0 1.0 (public domain): furniture, vehicles, space,
blasters and car parts, {first["models"]} models. Thank you, Kenney. The models are not part of midilite; these
weights, and the renderings and surfaces in `../demo`, `../demo_val` and `../example`, were made from them and are
likewise CC0.

- The shape VAE saw all categories. The transformer and both image encoders saw **furniture only**, without parts of
  houses and flat things (rugs, floors), in random scenes of one to four objects: random yaw, scale, place and tints,
  each object stretched along its axes by up to {1 + STRETCH:g} and every second one mirrored, seen from {low:g} to
  {high:g} degrees above with a field of view of {SETTINGS.fov:g} degrees, on white.
- Held out of all training, chosen by a hash of the name: {", ".join(first["held_out_models"])}."""


def _making(results: Results) -> str:
    first, second, fourth = (results[name] for name in ("tiny_model", "second_edition", "fourth_edition"))
    runs, vae = [*second["runs"], fourth], first["vae"]["facts"]
    instances = sum(run["steps"] * run["instances_per_step"] for run in runs)
    minutes = sum(run["minutes"] * run.get("gpus", 1) for run in runs)
    rows = (
        (
            run["run"],
            run["start"],
            f"{run['steps']:,} x {run['instances_per_step']:,}",
            run["learning_rate"],
            " x ".join(f"{run[key]}" for key in ("gpus", "minutes") if key in run),
        )
        for run in runs
    )
    return f"""## How it was made, and what it cost

**Transformer and image encoders: {minutes:.0f} minutes of GPU time**, {instances / 1e6:.1f} million instances (the
second edition's runs on {second["hardware"]}; the fourth's on {fourth["hardware"]}). That is about what an hour of one
rented data centre GPU costs; a second try is affordable for anyone. The rectified flow was trained by midilite's own
`Trainer`; each run starts from the averaged weights of the one before.

{_table("run", "starts from", "steps x instances", "learning rate", "GPUs x minutes")}
{_rows(rows)}

**VAE: {vae["steps"]:,} steps of {first["batch"]["vae_objects"]} objects** ({first["hardware"]}; its minutes were not
kept): signed distances by winding number, slope and normals, KL. The encoder's noise is
{vae["posterior_std_share"]:.0%} of the latents' spread; latents are normalised to mean 0 and deviation 1 inside
`quant` and `post_quant`."""


def _scenes(results: Results) -> str:
    speed, before, first = results["speed"], results["speed_second_edition"], results["tiny_model"]
    rows, goals = [], []
    for name, title in (("seen", SEEN), ("unseen", UNSEEN)):
        now, then = (table["sampling"][f"eval-{name}"] for table in (speed, before))
        guided = results["fourth_edition"]["measured"][name]["by_seed"]
        rows += [
            (
                f"**{title}: as it is sampled unless asked otherwise**",
                some_seeds(len(now["seeds"])),
                *_measured(now["ways"][SHIPS]),
            ),
            (f"the same, {BEFORE}", some_seeds(len(guided)), *_over_seeds(guided)),
        ]
        if name == "seen":
            fast = speed["runs"]["fast"]
            rows += [("the same with the speed adapter `fast/`", some_seeds(len(now["seeds"])), *_measured(fast))]
        rows += [
            ("the same, second edition", some_seeds(len(then["seeds"])), *_measured(then["ways"][SHIPS])),
            ("the same, first edition", some_seeds(1), *_measured(first["flow"][name])),
        ]
        goals.append(_goals(name, title, [now["ways"][SHIPS][key] for key in KEYS]))
    scenes, reached = speed["sampling"]["eval-seen"]["scenes"], "\n".join(goals)
    return f"""## How good its scenes are

{scenes} scenes of 2 to 4 objects for each row, against the raw surfaces as data preparation samples them,
without alignment. Errors are standard errors of the mean: over scenes or over seeds of the noise, whichever is larger
(over seeds alone for {BEFORE}). Rows of the first edition were measured on {first["hardware"]}, that of `fast/` on
{speed["runs"]["fast"]["measured_on"]}, all others on {speed["hardware"].partition(";")[0]}.

{_table("scenes", "noise", *MEASURES)}
{_rows(rows)}

{reached}"""


def _goals(name: str, title: str, values: Sequence[float]) -> str:
    parts = []
    for measure, goal, value in zip(MEASURES, GOALS[name], values, strict=True):
        word = "reached" if value >= goal else "**not reached**"
        parts.append(f"{measure} {goal:.2f} {word} ({value:.3f})")
    return f"- Goals, {title}: {', '.join(parts)}."


def _surfaces(results: Results) -> str:
    vae, decoder = results["tiny_model"]["vae"], results["third_edition"]["decoder"]
    exact = next(value for key, value in decoder.items() if key.startswith("exact field"))
    tried = next(value for key, value in decoder.items() if key.startswith("queries in fp32"))
    made = next(value for key, value in decoder.items() if key.startswith("on latents"))
    before, after = decoder["before"][FRAME]["normals"], tried[FRAME]["normals"]
    word = "reached" if before >= NORMALS_GOAL else "not reached"
    names = (("**ships**", decoder["before"]), ("tried: a deeper decoder on the same latents", tried))
    names += (("bound: an exact field on the same grid, every fourth model", exact),)
    rows = [(name, *(found[size][key] for size in (FRAME, SCENE) for key in SURFACE)) for name, found in names]
    worst = ", ".join(f"{row['name']} {row['f_score']:.2f}" for row in vae["unseen"]["worst"])
    heads = [f"{key}, {size}" for size in (FRAME, SCENE) for key in ("normals", "F(0.02)", "F(0.05)")]
    each = (
        (f"{name} in training", r["models"], r["median_f_score"], r["mean_f_score"], f"{r['closed']}/{r['models']}")
        for name, r in ((name, vae[name]) for name in ("seen", "unseen"))
    )
    generated = [made[name]["normals"] for name in ("second edition", "queries in fp32")]
    return f"""## How good its surfaces are

Encoded and decoded {vae["unseen"]["models"]} models that the VAE never saw; normals: mean |cos| at nearest points.

{_table("decoder", *heads)}
{_rows(rows)}

Normals of {NORMALS_GOAL:g}, the goal, are **{word}**: {before:.3f} before and {after:.3f} after the third edition's
decoder, which therefore does not ship. The grid is not what bounds them (an exact field leaves
{exact[FRAME]["normals"]:.3f}), nor the number of models (those seen in training come out no better); what is left is
training time, what the latents hold, and the decoder's one look at them. On latents that the second
edition generates normals are
{generated[0]:.3f} and {generated[1]:.3f}: there the transformer's errors decide. Measured on
{results["third_edition"]["hardware"].partition(",")[0]}.

Objects that fill the frame, against the surface of the solid ({POINTS} points, grid depth {Plan().depth}):

{_table("models", "number", f"median F-score({OBJECT_TAU})", "mean", "closed meshes")}
{_rows(each)}

Worst five it never saw (`examples/recipes/tiny_model/results/tiny_model_worst.png`): {worst}."""


FRAME, SCENE = "fills the frame", "as in a scene"
SURFACE = ("normals", "f_0.02", "f_0.05")


def _fast(results: Results) -> str:
    speed = results["speed"]
    ways, fast = speed["sampling"]["eval-seen"]["ways"], speed["runs"]["fast"]
    words = fast["command"].split()
    rank, steps = (words[words.index(f"--{name}") + 1] for name in ("lora_rank", "max_train_steps"))
    rows = (
        (f"{SHIPS}: the default", ways[SHIPS]["passes"], *_measured(ways[SHIPS])),
        (f"speed adapter, {fast['passes']} steps without guidance (`--fast`)", fast["passes"], *_measured(fast)),
    )
    return f"""## Solver and speed adapter

{_table("way", "passes", *MEASURES)}
{_rows(rows)}

`fast/` is a LoRA on every linear, distilled at rank {rank} from pictures and masks of {fast["scenes"]} prepared
scenes: {fast["train_seconds"] / 60:.0f} minutes on one {fast["device"]} that others shared, which ended it after
{fast["steps_done"]:,} of {int(steps):,} planned steps. What ships is the average of its weights with as many numbers as
rank {fast["shipped_rank"]} has, dealt out among modules (`adapter.py resize --share_ranks`).
Other solvers, numbers of steps and adapters: `examples/recipes/tiny_model/README.md`."""


def _vehicles(results: Results) -> str:
    rows, found = results["tuning"], choices(results["tuning"])
    lines, chosen = [("none (the base)", "-", *_study(found["base"]))], []
    for scenes in SCENES:
        for title, rank, rate in VARIANTS:
            if row := found.get(Cell(scenes, rank, rate).name):
                lines.append((scenes, f"{title}, rate {rate:g}", *_study(row)))
                chosen.append(row)
    hours = sum(row.get("seconds", 0.0) for row in rows.values()) / 3600
    heads = [f"new arrangements: {MEASURES[0]}", MEASURES[2], "new vehicles: scene", "furniture: scene"]
    trained = [row for row in rows.values() if row["name"] != "base"]
    return f"""## Fine-tuning on vehicles, which the transformer never saw

{len(trained)} trainings of {trained[0]["steps"]} steps, {hours:.1f} hours in all beside each other on H200 GPUs.
Rows: {seeds_told(chosen)}; the standard error stands where there are {LEAST_SEEDS} or more. The
whole study, and how far a row of one seed may be off: `examples/fine_tune.md`.

{_table("scenes", "trained", *heads)}
{_rows(lines)}

{_gain(found, results["tuning_second_edition"])}"""


def _gain(found: Results, second: Results) -> str:
    """What share of the gain of training all weights rank 16 has, each at its best rate.

    Args:
        found: see `choices`.
        second: rows with several seeds, which tell what chance does.
    """
    base, (lora, rate), (whole, whole_rate) = found["base"], _best(found, 16, RATES), _best(found, 0, WHOLE_RATES)
    parts = []
    for key, measure in (("scene_f_score", "scene F"), ("object_f_score", "object F")):
        gain = whole[CURVE][key] - base[CURVE][key]
        share = (lora[CURVE][key] - base[CURVE][key]) / gain
        chance = math.hypot(lora["seeds"] ** -0.5, share * whole["seeds"] ** -0.5)
        error = chance * scatter(second, CURVE, key).deviation / gain
        word = "reached" if share >= GAIN_GOAL else "not reached"
        parts.append(f"{share:.0%} ± {error:.0%} in {measure} ({word})")
    forgets, keeps = (_number(row["furniture"], "scene_f_score") for row in (lora, whole))
    return (
        f"Of what all weights gain on {GAIN_SCENES} scenes ({whole_rate}) rank 16 ({rate}) gains "
        f"{' and '.join(parts)}; goal {GAIN_GOAL:.0%}. {seeds_told((lora, whole))}; errors are what chance does by the "
        f"second edition's choices of {LEAST_SEEDS} seeds. Furniture is then at {forgets} with rank 16 and at {keeps} "
        "with all weights."
    )


def _best(found: Results, rank: int, rates: Sequence[float]) -> tuple[Results, str]:
    """The choice of this rank with the best scene F, and its rate in words."""
    best = max(rates, key=lambda rate: found[Cell(GAIN_SCENES, rank, rate).name][CURVE]["scene_f_score"])
    words = f"at rate {best:g}, the best of {', '.join(f'{rate:g}' for rate in rates)}"
    return found[Cell(GAIN_SCENES, rank, best).name], words


def _study(row: Mapping[str, Any]) -> list[str]:
    keys = ((CURVE, "scene_f_score"), (CURVE, "object_f_score"), ("unseen_vehicles", "scene_f_score"))
    return [_number(row[test], key) for test, key in (*keys, ("furniture", "scene_f_score"))]


def _demo(results: Results) -> str:
    kinds = {"the base": results["demo"]["base"], "with the demo's adapter": results["demo"]["adapter"]}
    keys = ("scene_f_score", "bounding_box_iou", "object_f_score")
    rows = [(name, *(found["mean"]["none"][key]["mean"] for key in keys)) for name, found in kinds.items()]
    return f"""## The demo: six models of a space kit

`../demo` has {TRAINING.num_scenes} arrangements of {len(MODELS)} models, two in each ({", ".join(MODELS)}), and
`../demo_val` {VALIDATION.num_scenes} **other arrangements of the same models**, from other sides. They tell how well
these models are known, not how one comes out that was never shown. Measured on them by `evaluate.py`, one seed, with
the adapter that `examples/configs/demo.yaml` makes on a CPU:

{_table("model", *MEASURES)}
{_rows(rows)}"""


LIMITS = """## Limits

- Pictures must look like the training renderings: low-poly objects on white, seen from slightly above.
- Thin parts, such as legs and rods, often come out ragged or broken; planes come out dented and edges rounded.
- Furniture that it never saw comes out worse, other things much worse without an adapter.
- An adapter for another domain costs some of what the model knows of furniture (last column of the vehicles' table)."""


def _measured(row: Mapping[str, float]) -> list[str]:
    return [_number(row, key) for key in KEYS]


def _number(row: Mapping[str, float], key: str) -> str:
    error = f" ± {row[f'{key}_error']:.3f}" if f"{key}_error" in row else ""
    return f"{row[key]:.3f}{error}"


def _over_seeds(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """Means over seeds, with their standard errors where there are several."""
    found: dict[str, float] = {}
    for key in KEYS:
        values = [row[key] for row in rows]
        found[key] = fmean(values)
        if len(values) > 1:
            found[f"{key}_error"] = stdev(values) / math.sqrt(len(values))
    return _measured(found)


def _table(*heads: str) -> str:
    return _row(heads) + "\n" + _row(["---"] * len(heads)).replace(" ", "")


def _rows(rows: Any) -> str:
    return "\n".join(_row(row) for row in rows)


def _row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(f"{c:.3f}" if isinstance(c, float) and c <= 1 else str(c) for c in cells) + " |"
