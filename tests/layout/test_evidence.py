"""What masks say of outlines."""

import numpy as np
import torch

from midilite.layout.evidence import Masks, distance_to, mask_iou, outline, sampled, scaled


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
    own, hidden = torch.zeros(1, 8, 12, dtype=torch.bool), torch.zeros(8, 12, dtype=torch.bool)
    own[0, :4, 2:6], hidden[:4, 6:8] = True, True
    evidence = Masks.of(own, hidden).evidence(torch.zeros(1, 1, dtype=torch.bool))
    assert evidence.distance[0, 1].tolist()[:9] == [1.5, 0.5, -0.5, -1.5, -1.5, -0.5, 0, 0, 0.5]
    edge = outline(own)[0]
    assert edge[0, 2] and edge[3, 3] and not edge[0, 3]  # the upper side is the picture's
    assert evidence.slope[0, 1, 2].tolist() == [-1, 0]


def test_distances_are_those_to_all_that_hides_an_object():
    own = torch.zeros(3, 20, 24, dtype=torch.bool)
    own[0, 4:8, 2:6], own[1, 10:14, 9:12], own[2, 2:5, 18:22] = True, True, True
    unknown = torch.zeros(20, 24, dtype=torch.bool)
    unknown[17:, :3] = True
    order = torch.tensor([[False, True, False], [False, False, False], [True, True, False]])
    evidence = Masks.of(own, unknown).evidence(order)
    regions = [own[0] | own[1] | unknown, own[1] | unknown, own[0] | own[1] | own[2] | unknown]
    for i, region in enumerate(regions):
        assert torch.equal(evidence.hidden[i] | own[i], region)
        assert torch.equal(evidence.distance[i][~region], distance_to(region[None])[0][~region] - 0.5)


def test_pixels_are_chosen_evenly_and_few_of_them_more_than_once():
    region = torch.zeros(3, 5, 7, dtype=torch.bool)
    region[0, 1], region[1, 2, 3] = True, True
    row, column, there = sampled(region, 4)
    assert row[:2].tolist() == [[1, 1, 1, 1], [2, 2, 2, 2]]
    assert column[:2].tolist() == [[0, 1, 3, 5], [3, 3, 3, 3]]
    assert there[:, 0].tolist() == [True, True, False] and int(row.max()) < 5 and int(column.max()) < 7


def test_pixels_of_unknown_things_are_left_out_of_the_iou():
    own = torch.tensor([[[True, True, False, False]]])
    shown = torch.tensor([[[True, False, False, True]]])
    assert float(mask_iou(shown, own)) == 1 / 3
    assert float(mask_iou(shown, own, torch.tensor([[False, False, False, True]]))) == 1 / 2


def test_pictures_are_thinned_evenly_and_small_ones_stay():
    picture = np.arange(12).reshape(3, 4)
    assert scaled(picture, 10) is not picture and np.array_equal(scaled(picture, 10), picture)
    assert scaled(np.zeros((300, 100)), 128).shape == (128, 43)
