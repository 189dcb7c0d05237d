"""Seeds: keys decide, and torch's hidden generators draw what torch.manual_seed lets them draw."""

import pytest
import torch

from midilite.common.seeds import derive_seed, name_text, seed_hidden_generators
from midilite.training import plan as schedules
from midilite.training.plan import Plan


def test_the_text_of_a_name_is_the_same_in_any_locale():
    assert name_text("椅子") == name_text("椅子".encode().decode("ascii", "surrogateescape")) == "椅子"
    assert name_text("caf\udce9") == "caf\udce9"


def test_every_key_its_type_and_its_place_count():
    keys = [(1, 2), (2, 1), ("1", 2), (12,), (1, 2, 0), ("1", "2")]
    seeds = {derive_seed(*key) for key in keys}
    assert len(seeds) == len(keys) and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 2) == derive_seed(1, 2)


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0"])
def test_hidden_generators_draw_as_after_torchs_own_seeding(name):
    if name != "cpu" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    device = torch.device(name)
    torch.manual_seed(derive_seed(7, "dropout"))
    expected = torch.rand(5), torch.rand(5, device=device)
    seed_hidden_generators(device, 7, "dropout")
    assert all(map(torch.equal, (torch.rand(5), torch.rand(5, device=device)), expected))


def test_an_epochs_order_is_asked_for_often_and_drawn_once(monkeypatch):
    """Steps of a large data set would otherwise shuffle all of it several times each."""
    schedules._order.cache_clear()
    plan, draws, usual = Plan(1000, 4, 1, 1, seed=-3), [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **kwargs: draws.append(args) or usual(*args, **kwargs))
    steps = [plan.scenes(step) for step in range(2 * plan.steps_per_epoch)]
    assert len(draws) == 2 and sorted(sum(steps[: plan.steps_per_epoch], [])) == list(range(1000))
    steps[0].clear()  # a caller's list is its own
    assert plan.scenes(0) and steps[250] != plan.scenes(0)


def test_names_of_files_give_one_seed_in_every_locale():
    """Under LC_ALL=C Python shows each byte of a name as half a surrogate pair."""
    name = "椅子"
    assert derive_seed(1, name.encode().decode("ascii", "surrogateescape")) == derive_seed(1, name)
    assert derive_seed(1, b"caf\xe9".decode("utf-8", "surrogateescape")) != derive_seed(1, "caf")
    assert derive_seed("\ud800") != derive_seed("\ud801")
