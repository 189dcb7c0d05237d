"""The model card, made from the results' json."""

from __future__ import annotations

TEMPLATE = """# The tiny model

A MIDI-3D model of {millions:.1f} M parameters in the published folder layout (fp16), trained from scratch for
midilite and small enough for a CPU. It knows low-poly furniture and nothing else. Made by
`examples/recipes/tiny_model/run.py`; all numbers below come from `examples/recipes/tiny_model/results/tiny_model.json`.

| part | parameters |
|---|---|
{parts}

## Data and licence

Trained on 3D models by **Kenney** (kenney.nl), released under CC0 1.0 (public domain): furniture, vehicles, space,
blasters and car parts, {models} models. Thank you, Kenney. The models are not part of midilite; these weights, and the
renderings and surfaces in `../demo` and `../example`, were made from them and are likewise CC0.

- The shape VAE saw all categories. The transformer and both image encoders saw **furniture only**, without parts of
  houses and flat things (rugs, floors), in random scenes of one to four objects: random yaw, scale, place and tints,
  seen from 0 to 30 degrees above with a field of view of 40 degrees, on white.
- Held out of all training, chosen by a hash of the name: {held_out}.

## How it was made

On {hardware}. VAE: {vae_steps} steps of {vae_batch} objects (signed distances by winding number, slope and normals,
KL); the encoder's noise is {noise:.0%} of the latents' spread, and latents are normalised to mean 0 and deviation 1
inside `quant` and `post_quant`. Transformer and encoders together: {flow_steps} steps of {flow_batch} instances in
{flow_minutes:.1f} minutes by rectified flow with midilite's `Trainer`; an average of the weights (decay 0.999) ships.
Seeds: {seeds}.

## Measured quality

VAE, objects that fill the frame, against the surface of the solid (4096 points, grid depth 6):

| models | number | median F-score(0.05) | mean | closed meshes |
|---|---|---|---|---|
{vae_rows}

Worst five it never saw (pictured in `examples/recipes/tiny_model/results/tiny_model_worst.png`): {worst}.

Scenes of 2 to 4 objects, {sampling_steps} steps, guidance {guidance}, shift {shift}, against the raw surfaces as data
preparation samples them, no alignment. Guidance and shift were chosen among {trials} pairs on the first 20 of the 100
seen scenes, so that row is slightly flattered:

| scenes | number | scene F-score(0.1) | box IoU | object F-score(0.1) |
|---|---|---|---|---|
{flow_rows}

{verdict}
{limit}
## LoRA on vehicles, which the transformer never saw

{study_steps} steps of {study_batch} scenes each, the same scenes and noise for all; encoders and VAE frozen; one seed.
Loss: mean squared error at fixed noise. Learning rate {rates}; no rate was tuned. Times are of two
runs at once on one host, and the first run of each process includes its start-up, so they compare badly.

| variant | parameters | fp16 MB | seconds | loss | scene F | IoU | object F | loss* | scene F* | IoU* | object F* |
|---|---|---|---|---|---|---|---|---|---|---|---|
{study_rows}

Without star: trained vehicles in {arrangements} unseen arrangements. With star: {vehicles} scenes of the three
vehicles that no network ever saw.
Share of the gain of training all weights, in scene F-score on unseen arrangements: {gains}.

## Limits

- Pictures must look like the training renderings: low-poly objects on white, seen from slightly above.
- Thin parts, such as legs and rods, often come out ragged or broken.
- Furniture that it never saw comes out worse (see the table), other things much worse without an adapter.
- It was trained for minutes; the targets that were missed most likely need more steps of the transformer.
"""


def _row(*cells: object) -> str:
    return "| " + " | ".join(f"{c:.3f}" if isinstance(c, float) else str(c) for c in cells) + " |"


def _verdict(flow: dict) -> str:
    """Which of the targets were reached."""
    seen = flow["seen"]
    lines = []
    for name, key, target in (("scene F-score(0.1)", "scene_f_score", 0.85), ("box IoU", "box_iou", 0.55)):
        word = "reached" if seen[key] >= target else "**missed**"
        lines.append(f"{name}: target {target}, {word} with {seen[key]:.3f}")
    return "Targets on seen furniture: " + "; ".join(lines) + "."


def _rates(rows: list[dict]) -> str:
    """The learning rates, with who had them."""
    by_rate: dict[float, list[str]] = {}
    for row in rows:
        if "learning_rate" in row:
            by_rate.setdefault(row["learning_rate"], []).append("all weights" if not row["rank"] else "adapters")
    return ", ".join(f"{rate:g} for {names[0]}" for rate, names in sorted(by_rate.items(), reverse=True))


def _gains(rows: list[dict]) -> str:
    """How much of the full finetune's gain each adapter has."""
    score = {row["name"]: row["unseen_arrangements"].get("scene_f_score", 0.0) for row in rows}
    full = score["all weights"] - score["base"]
    names = [name for name in score if name.startswith("rank") and "," not in name]
    return ", ".join(f"{name} {(score[name] - score['base']) / full:.0%}" for name in names)


def model_card(results: dict) -> str:
    """The card as Markdown."""
    vae, flow, study = results["vae"], results["flow"], results["lora"]
    tests = ("unseen_arrangements", "unseen_vehicles")
    keys = ("loss", "scene_f_score", "box_iou", "object_f_score")
    order = {"base": 0, "rank 4": 1, "rank 16": 2, "rank 64": 3, "all weights": 4}
    rows = sorted(study["variants"], key=lambda row: order.get(row["name"], 9))
    facts = flow["facts"]
    limit = results.get("limit")
    return TEMPLATE.format(
        millions=sum(results["parameters"].values()) / 1e6,
        parts="\n".join(_row(name, f"{count:,}") for name, count in results["parameters"].items()),
        models=results["models"],
        held_out=", ".join(results["held_out_models"]),
        hardware=results["hardware"],
        vae_steps=vae["facts"]["steps"],
        vae_batch=results["batch"]["vae_objects"],
        flow_batch=results["batch"]["flow_instances"],
        trials=len(flow["guidance_and_shift"]),
        rates=_rates(rows),
        gains=_gains(rows),
        arrangements=study["settings"]["scenes_tested"]["unseen_arrangements"],
        vehicles=study["settings"]["scenes_tested"]["unseen_vehicles"],
        noise=vae["facts"]["posterior_std_share"],
        flow_steps=facts["steps"],
        flow_minutes=facts["minutes"],
        seeds=", ".join(f"{name} {seed}" for name, seed in results["seeds"].items()),
        vae_rows="\n".join(
            _row(
                f"{name} in training",
                r["models"],
                r["median_f_score"],
                r["mean_f_score"],
                f"{r['closed']}/{r['models']}",
            )
            for name, r in ((n, vae[n]) for n in ("seen", "unseen"))
        ),
        worst=", ".join(f"{w['name']} {w['f_score']:.2f}" for w in vae["unseen"]["worst"]),
        sampling_steps=facts["steps_of_sampling"],
        guidance=facts["guidance_scale"],
        shift=facts["shift"],
        flow_rows="\n".join(
            _row(label, flow[n]["scenes"], flow[n]["scene_f_score"], flow[n]["box_iou"], flow[n]["object_f_score"])
            for n, label in (
                ("seen", "seen furniture, unseen arrangements"),
                ("unseen", "unseen furniture"),
                ("seen_without_multi_instance", "seen, multi-instance attention off"),
            )
        ),
        verdict=_verdict(flow),
        limit=_limit(limit) if limit else "",
        study_steps=study["settings"]["steps"],
        study_batch=study["settings"]["batch"],
        study_rows="\n".join(
            _row(
                row["name"],
                f"{row['parameters']:,}",
                row.get("megabytes_fp16", 0),
                f"{row['seconds']:.0f}",
                *(row[test].get(key, 0.0) for test in tests for key in keys),
            )
            for row in rows
        ),
    )


def _limit(limit: dict) -> str:
    raw, outer = limit["vae_raw"], limit["vae_outer"]
    return (
        f"\nWhat the VAE alone leaves possible on {limit['scenes']} of these scenes (true latents, decoded): scene "
        f"F-score {raw['scene_f_score']:.3f} and box IoU {raw['box_iou']:.3f} against raw surfaces, "
        f"{outer['scene_f_score']:.3f} and {outer['box_iou']:.3f} against outer surfaces only.\n"
    )
