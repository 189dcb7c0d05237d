"""Two studies of adapters: which kind learns best on the same budget, and what two adapters of two domains do together.

    python examples/study_adapters.py --pretrained_model tiny --output outputs/study_adapters

Study 1 trains LoRA, rsLoRA, DoRA, LoRA+ and PiSSA at several ranks on domain A: the same scenes, steps, batches and
alpha, and the same learning rates to choose from (each is trained with all of them; the best validation loss counts, so
no kind wins by a rate that was tuned for it). The table has the loss and the F-scores of generated validation scenes.

Study 2 trains a LoRA on domain B too and measures both domains with the adapters mixed as (1 - t) A + t B, and with
both at full strength; the contact sheet shows the same scenes at every mixture.

Domains are folders of samples (`--data_a`, `--data_b`). By default two small ones are made from generated shapes: A has
only boxes and their like, B only round ones. Runs that are finished are kept: the command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from midilite import lora  # noqa: E402
from midilite.adapters import AdapterFile, apply_adapter, read_adapter  # noqa: E402
from midilite.distributed import World  # noqa: E402
from midilite.evaluation import Evaluation, Generated  # noqa: E402
from midilite.files import atomic_write, read_json, write_bytes, write_json  # noqa: E402
from midilite.generate import build_scene  # noqa: E402
from midilite.model_folder import ModelFolder  # noqa: E402
from midilite.prepare import PrepareSettings, prepare  # noqa: E402
from midilite.preview import fitted, scene_pictures  # noqa: E402
from midilite.render import preview_sheet  # noqa: E402
from midilite.train import open_features, train_lora, training_data  # noqa: E402
from midilite.train_options import TrainOptions  # noqa: E402
from midilite.validation import Validation  # noqa: E402

KINDS = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "LoRA+": {"lora_plus_ratio": 16.0},
    "PiSSA": {"lora_init": "pissa"},
}
METRICS = ("scene_chamfer", "scene_f_score", "object_f_score")
PICTURE = 160  # pixels of each picture on the contact sheet


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pretrained_model", default="tiny", help="checkpoint folder or shipped model")
    parser.add_argument("--data_a", help="samples of the first domain; generated when left out")
    parser.add_argument("--data_b", help="samples of the second domain, likewise")
    parser.add_argument("--output", type=Path, default=Path("outputs/study_adapters"))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--lora_alpha", type=float, default=16.0)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of every run")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--mix_rank", type=int, default=16, help="rank of the two adapters that are mixed")
    parser.add_argument("--mixes", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0], help="shares of B")
    parser.add_argument("--eval_scenes", type=int, default=6, help="generated validation scenes per measurement")
    parser.add_argument("--inference_steps", type=int, default=20)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--grid_depth", type=int, default=6)
    parser.add_argument("--num_tokens", type=int)
    parser.add_argument("--made_scenes", type=int, default=60, help="scenes per domain when they are generated")
    parser.add_argument("--made_points", type=int, default=4096, help="their surface points per object")
    parser.add_argument("--device", help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=42)
    return parser


# ------------------------------------------------------------------------------------------------------------ the data


def make_domain(folder: Path, name: str, args: argparse.Namespace) -> Path:
    """A data folder of arrangements of generated shapes: "angular" or "round"."""
    from trimesh import creation

    raw, out = folder / name / "raw", folder / name / "data"
    raw.mkdir(parents=True, exist_ok=True)
    sizes = (0.4, 0.7, 1.0)
    if name == "angular":
        shapes = {f"box{i}{j}": creation.box((a, b, 1.4 - a)) for i, a in enumerate(sizes) for j, b in enumerate(sizes)}
        shapes |= {f"prism{i}": creation.cylinder(0.4, a, sections=3) for i, a in enumerate(sizes)}
    else:
        shapes = {f"ball{i}": creation.icosphere(3, a / 2) for i, a in enumerate(sizes)}
        shapes |= {f"ring{i}": creation.torus(0.5, a / 5) for i, a in enumerate(sizes)}
        shapes |= {f"pill{i}": creation.capsule(a, 0.25) for i, a in enumerate(sizes)}
    for shape, mesh in shapes.items():
        mesh.export(raw / f"{shape}.ply")
    settings = PrepareSettings(
        num_samples=args.made_points, image_size=192, compose=3, num_scenes=args.made_scenes, singles=False
    )
    prepare(raw, out, settings, num_workers=1, log=lambda text: None)
    return out


# --------------------------------------------------------------------------------------------------------- measurement


class Bench:
    """A transformer on which adapters are measured with the validation scenes of the domains."""

    def __init__(self, options: Mapping[str, TrainOptions]) -> None:
        first = next(iter(options.values()))
        self.device = torch.device(first.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        folder = ModelFolder(first.pretrained_model)
        self.transformer = folder.load_transformer(self.device)
        self.validation: dict[str, Validation] = {}
        self.evaluation: dict[str, Evaluation] = {}
        for name, own in options.items():
            scenes = training_data(own, folder).validation
            features = open_features(folder, own, self.device, own.num_tokens or folder.default_num_tokens)
            features.prepare(scenes)
            self.validation[name] = Validation(self.transformer, features, scenes, own)
            self.evaluation[name] = Evaluation(self.transformer, features, folder, scenes, own)
        self.vae = folder.load_vae(self.device)

    def loss(self, domain: str) -> float:
        """Validation loss with the adapters as they are."""
        levels = self.validation[domain].measure(World(), self.device)
        return sum(levels) / len(levels)

    @torch.no_grad()
    def scenes(self, domain: str) -> list[Generated]:
        """The validation scenes of a domain, generated with the adapters as they are."""
        evaluation = self.evaluation[domain]
        return [evaluation.generate(scene, self.vae) for scene in evaluation.scenes]

    def scores(self, generated: Sequence[Generated]) -> dict[str, float | None]:
        """Means of METRICS over the scenes where they are defined, and how many instances have no surface."""
        rows = [one.metrics(self.device) for one in generated]
        means: dict[str, float | None] = {}
        for key in METRICS:
            values = [row["none"][key] for row in rows if row["none"][key] is not None]
            means[key] = sum(values) / len(values) if values else None
        return {**means, "missing_instances": sum(row["missing_instances"] for row in rows)}


@dataclass(frozen=True)
class Run:
    """One training of study 1."""

    kind: str
    rank: int
    rate: float

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.kind.lower().replace('+', '_plus')}-r{self.rank}-{self.rate:g}"


def trained(options: TrainOptions, run: Run) -> tuple[Path, float]:
    """(the adapter, seconds of training); trains unless that was done before."""
    folder = Path(options.output_dir) / run.name
    own = dataclasses.replace(
        options, output_dir=str(folder), lora_rank=run.rank, learning_rate=run.rate, **KINDS[run.kind]
    )
    done, settings = folder / "done.json", json.loads(json.dumps(dataclasses.asdict(own)))
    if not done.is_file():
        started = time.monotonic()
        train_lora(own)
        write_json(done, {"seconds": time.monotonic() - started, "options": settings})
    record = read_json(done)
    if record["options"] != settings:
        raise ValueError(f"{folder}: was trained with other settings; name another --output, or remove that folder")
    return folder / "lora-final", record["seconds"]


def trainable(bench: Bench, options: TrainOptions, run: Run) -> int:
    """Weights that a run trains."""
    own = dataclasses.replace(options, lora_rank=run.rank, **{**KINDS[run.kind], "lora_init": "kaiming"})
    lora.inject(bench.transformer, own.adapter_config(), "count")
    count = sum(p.numel() for p in lora.adapter_parameters(bench.transformer, "count").values())
    lora.remove_adapters(bench.transformer)
    return count


# ---------------------------------------------------------------------------------------------------------- the studies


def study_kinds(bench: Bench, options: TrainOptions, args: argparse.Namespace) -> list[dict]:
    """Study 1: one row per kind and rank, at the learning rate with the lowest validation loss."""
    base = {"kind": "base", "loss": bench.loss("A"), **bench.scores(bench.scenes("A"))}
    rows = [base]
    for rank in args.ranks:
        for kind in args.kinds:
            losses = {}
            for rate in args.learning_rates:
                adapter, seconds = trained(options, Run(kind, rank, rate))
                apply_adapter(bench.transformer, read_adapter(adapter), "x")
                losses[rate] = bench.loss("A")
                lora.remove_adapters(bench.transformer)
            best = min(losses, key=losses.__getitem__)
            run = Run(kind, rank, best)
            adapter, seconds = trained(options, run)
            weights = trainable(bench, options, run)
            apply_adapter(bench.transformer, read_adapter(adapter), "x")
            scores = bench.scores(bench.scenes("A"))
            lora.remove_adapters(bench.transformer)
            row = {"kind": kind, "rank": rank, "weights": weights, "rate": best, "seconds": seconds}
            rows.append({**row, "loss": losses[best], "losses": {f"{r:g}": v for r, v in losses.items()}, **scores})
            print(f"{kind} rank {rank}: loss {losses[best]:.4f} at {best:g} (base {base['loss']:.4f})", flush=True)
    return rows


def best_adapter(bench: Bench, domain: str, options: TrainOptions, args: argparse.Namespace) -> AdapterFile:
    """The LoRA of a domain at the learning rate with its lowest validation loss."""
    losses = {}
    for rate in args.learning_rates:
        adapter = read_adapter(trained(options, Run("LoRA", args.mix_rank, rate))[0])
        apply_adapter(bench.transformer, adapter, "x")
        losses[bench.loss(domain)] = adapter
        lora.remove_adapters(bench.transformer)
    return losses[min(losses)]


def study_mixes(
    bench: Bench, options: Mapping[str, TrainOptions], args: argparse.Namespace
) -> tuple[list[dict], Image.Image]:
    """Study 2: (rows of measurements, the contact sheet)."""
    chosen = {domain: best_adapter(bench, domain, own, args) for domain, own in options.items()}
    for domain, adapter in chosen.items():
        apply_adapter(bench.transformer, adapter, domain)
    mixes: dict[str, dict[str, float]] = {"base": {}}
    mixes |= {f"{1 - t:g} A + {t:g} B": {"A": 1 - t, "B": t} for t in args.mixes}
    mixes["A + B"] = {"A": 1.0, "B": 1.0}
    rows, shown = [], {}
    for name, weights in mixes.items():
        row: dict = {"mixture": name}
        for domain in options:
            with lora.temporary_weights(bench.transformer, weights):
                generated = bench.scenes(domain)
                row[domain] = {"loss": bench.loss(domain), **bench.scores(generated)}
            shown[domain, name] = generated[:2]
        rows.append(row)
        print(f"{name}: " + ", ".join(f"{d} loss {row[d]['loss']:.4f}" for d in options), flush=True)
    lora.remove_adapters(bench.transformer)
    return rows, contact_sheet(shown, list(options), list(mixes))


def contact_sheet(
    shown: Mapping[tuple[str, str], list[Generated]], domains: Sequence[str], mixes: Sequence[str]
) -> Image.Image:
    """A row per scene: the input, and what every mixture makes of it."""
    pictures, captions = [], []
    for domain in domains:
        for number, scene in enumerate(shown[domain, mixes[0]]):
            pictures.append(fitted(scene.image, PICTURE))
            captions.append(f"{domain}: input")
            for mixture in mixes:
                meshes = shown[domain, mixture][number].meshes
                pictures.append(scene_pictures(build_scene(meshes, range(1, len(meshes) + 1)), PICTURE)[0])
                captions.append(mixture)
    return preview_sheet(pictures, captions, columns=1 + len(mixes))


def table(rows: Sequence[Mapping], keys: Sequence[str]) -> str:
    """Rows as a Markdown table; what a row lacks or what is undefined is "-"."""

    def cell(value: object) -> str:
        return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [keys, ["---"] * len(keys), *([cell(row.get(key)) for key in keys] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def flat(rows: Sequence[Mapping]) -> list[dict]:
    """Rows of study 2 with one column per domain and measurement."""
    return [
        {"mixture": row["mixture"], **{f"{d} {key}": v for d in ("A", "B") for key, v in row[d].items()}}
        for row in rows
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both studies; returns the exit code: 0 done, 1 model or data can't be used."""
    args = build_parser().parse_args(arguments)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"study_adapters.py: error: {error}", file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace) -> None:
    """Both studies, their tables and their pictures."""
    made = args.output / "domains"
    data = {
        "A": args.data_a or make_domain(made, "angular", args),
        "B": args.data_b or make_domain(made, "round", args),
    }
    shared = TrainOptions(
        pretrained_model=args.pretrained_model,
        cache_dir=str(args.output / "cache"),
        device=args.device,
        batch_size=args.batch_size,
        max_train_steps=args.steps,
        lr_scheduler="cosine",
        lr_warmup_steps=args.steps // 20,
        lora_alpha=args.lora_alpha,
        num_tokens=args.num_tokens,
        checkpointing_steps=0,
        save_every_n_epochs=0,
        validate_every=0,
        preview_every=0,
        val_fraction=0.2,
        eval_scenes=args.eval_scenes,
        eval_inference_steps=args.inference_steps,
        eval_guidance_scale=args.guidance_scale,
        eval_grid_depth=args.grid_depth,
        logging_steps=max(1, args.steps // 5),
        seed=args.seed,
    )
    options = {
        domain: dataclasses.replace(shared, data_dir=str(folder), output_dir=str(args.output / f"runs-{domain}"))
        for domain, folder in data.items()
    }
    bench = Bench(options)
    kinds = study_kinds(bench, options["A"], args)
    mixes, sheet = study_mixes(bench, options, args)
    with atomic_write(args.output / "mixtures.png") as temporary:
        sheet.save(temporary, format="PNG")
    facts = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    write_json(args.output / "study.json", {"settings": facts, "kinds": kinds, "mixes": mixes})
    text = table(kinds, ("kind", "rank", "weights", "rate", "seconds", "loss", *METRICS, "missing_instances"))
    columns = ("mixture", *(f"{d} {key}" for d in ("A", "B") for key in ("loss", "scene_f_score", "object_f_score")))
    text += "\n\n" + table(flat(mixes), columns) + "\n"
    write_bytes(args.output / "study.md", text.encode())
    print(text)


if __name__ == "__main__":
    sys.exit(main())
