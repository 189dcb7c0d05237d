"""What masks say of outlines."""

import torch

from midilite.layout.evidence import Evidence, distance_to, mask_iou, outline


def test_distances_are_exact():
    region = torch.rand(2, 17, 23, generator=torch.Generator().manual_seed(0)) < 0.02
    found = distance_to(region)
    rows, columns = torch.meshgrid(torch.arange(17), torch.arange(23), indexing="ij")
    for i in range(2):
        there = region[i].nonzero().double()
        every = torch.stack([rows, columns], -1).double()
        expected = (every[:, :, None] - there).square().sum(-1).amin(2).sqrt()
        torch.testing.assert_close(found[i], expected)
    assert distance_to(torch.zeros(1, 4, 5, dtype=torch.bool)).eq(9).all()


def test_an_outline_may_go_on_behind_something_nearer_and_beyond_the_picture():
    own, hidden = torch.zeros(1, 8, 12, dtype=torch.bool), torch.zeros(1, 8, 12, dtype=torch.bool)
    own[0, :4, 2:6], hidden[0, :4, 6:8] = True, True
    evidence = Evidence.of(own, hidden)
    assert evidence.distance[0, 1].tolist()[:9] == [1.5, 0.5, -0.5, -1.5, -1.5, -0.5, 0, 0, 0.5]
    edge = outline(own)[0]
    assert edge[0, 2] and edge[3, 3] and not edge[0, 3]  # the upper side is the picture's
    assert evidence.slope[0, 1, 2].tolist() == [-1, 0]


def test_pixels_of_unknown_things_are_left_out_of_the_iou():
    own = torch.tensor([[[True, True, False, False]]])
    shown = torch.tensor([[[True, False, False, True]]])
    assert float(mask_iou(shown, own)) == 1 / 3
    assert float(mask_iou(shown, own, torch.tensor([[False, False, False, True]]))) == 1 / 2
