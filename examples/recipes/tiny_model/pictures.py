"""Sheets of pictures: the VAE's worst reconstructions, and columns with a caption below."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from midilite.common.seeds import torch_generator
from midilite.mesh.isosurface import extract_surface
from midilite.model.vae import VAE
from midilite.render.camera import orbit_camera
from midilite.render.render_mesh import RenderMesh
from midilite.render.renderer import preview_sheet, render

from .pools import query_points
from .shapes import ShapeSet

SIZE = 200
GAP, CAPTION = 8, 26  # pixels between cells, and of a line of text


def flat_mesh(corners: torch.Tensor) -> RenderMesh:
    """Grey triangles [F, 3, 3] with their own normals."""
    normals = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals = torch.nn.functional.normalize(normals, dim=1)[:, None].expand(-1, 3, -1)
    count = len(corners)
    faces = torch.arange(3 * count).view(-1, 3)
    nothing = faces.new_zeros(count, 3), faces.new_zeros(0, 3, dtype=torch.uint8)
    grey, ids = torch.full((count, 3, 3), 0.7), torch.ones(count, dtype=torch.int32)
    return RenderMesh(corners.reshape(-1, 3), faces, normals, grey, torch.zeros(count, 3, 2), *nothing, ids)


@torch.no_grad()
def worst_sheet(vae: VAE, shapes: ShapeSet, worst: Sequence[dict], tokens: int, depth: int = 6) -> Image.Image:
    """Pairs of pictures, the model and its reconstruction, of rows with `name` and `f_score`; shapes on the CPU."""
    images, captions = [], []
    for row in worst:
        index = shapes.names.index(row["name"])
        surface = shapes.surface(index, 2048, torch_generator("worst", row["name"]))[None]
        surface[..., :3] *= 0.95
        chosen = query_points(surface, tokens)
        mean, _ = vae.encode_queries(surface, surface.gather(1, chosen[..., None].expand(-1, -1, 6)))
        made = extract_surface(vae.field(mean[0]), depth=depth)
        for corners in (shapes.triangles(index) * 0.95, made.vertices[made.faces].float()):
            images.append(render([flat_mesh(corners)], orbit_camera(30, 20, size=SIZE)).image)
        captions += [row["name"].partition("/")[2], f"F {row['f_score']:.2f}"]
    return preview_sheet(images, captions, columns=4)


def captioned_columns(columns: Sequence[Sequence[Image.Image]], captions: Sequence[str]) -> Image.Image:
    """Pictures of one size in columns from left to right, each column with its caption below."""
    width, height = columns[0][0].size
    most = max(len(column) for column in columns)
    sheet = Image.new("RGB", (len(columns) * (width + GAP) + GAP, most * (height + GAP) + GAP + CAPTION), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for i, (column, caption) in enumerate(zip(columns, captions, strict=True)):
        left = GAP + i * (width + GAP)
        for j, image in enumerate(column):
            sheet.paste(image.convert("RGB"), (left, GAP + j * (height + GAP)))
        middle, bottom = left + width / 2, most * (height + GAP) + GAP
        pen.text((middle, bottom), caption, fill=(40, 40, 40), font=font, anchor="mt")
    return sheet
