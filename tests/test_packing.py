"""Packed rows: the same function and gradients as padded ones, and nothing that fills up has a part in them."""

import numpy as np
import pytest
import torch

import toy
from fedrank.adapter import kaiming
from fedrank.protocol import rng
from fedrank.training import fused, models, packing, tasks
from fedrank.training.compute import Compute
from fedrank.training.data import Rows
from fedrank.training.frozen import Frozen, freeze
from fedrank.training.hooks import live
from fedrank.training.models import Model

EXACT = Compute("float32", "torch")


@pytest.fixture(scope="module", params=["encoder", "decoder"])
def model(request: pytest.FixtureRequest) -> Model:
    if request.param == "encoder":
        return toy.encoder()
    return models.load(toy.settings(model={"name": "tiny-decoder"}, task="generate"), ())


@pytest.fixture(scope="module")
def encoded(model: Model) -> tasks.Encoded:
    if model.task == "classify":
        return toy.encoded("train")
    texts = toy.texts(16, 0).text
    rows = Rows([text[:5] for text in texts], completion=[text[: 2 + at] for at, text in enumerate(texts)])
    return tasks.encode(rows, model.tokenizer, "generate", 32)


def passed(
    frozen: Frozen, model: Model, encoded: tasks.Encoded, rows: np.ndarray
) -> tuple[float, dict[str, torch.Tensor]]:
    start = model.spec.with_head(kaiming(model.spec.shapes, 3, 2.0, rng(0, "start")))
    draw = rng(1, "B")
    for block in start.blocks.values():
        block.B[:] = draw.normal(size=block.B.shape) / 10
    on = live(start, start.take({}), "BAh", "cpu")
    with fused.mounted(frozen, [on]) as mounts:
        ((logits, labels),) = fused.outputs(frozen, encoded, [(mounts[0], rows)], mounts, "cpu")
        loss = tasks.loss(logits, labels)
        loss.backward()
    return float(loss.detach()), {name: grad.clone() for name, grad in on.grads.items()}


@pytest.mark.parametrize("rows", [np.arange(7), np.array([3]), np.array([5, 5, 2])])
def test_packed_and_padded_rows_give_the_same_loss_and_gradients(model, encoded, rows):
    frozen = freeze(model, EXACT, "cpu")
    assert frozen.first == 0
    found = passed(frozen, model, encoded, rows)
    frozen.first = None
    expected = passed(frozen, model, encoded, rows)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for name, grad in expected[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-3, atol=1e-5)


def test_the_models_own_attention_is_put_back(model, encoded):
    before = model.base.config._attn_implementation
    passed(freeze(model, EXACT, "cpu"), model, encoded, np.arange(4))
    assert model.base.config._attn_implementation == before
    inputs, _ = encoded.batch(np.arange(2), "cpu")
    model.network(**inputs)


def test_a_model_that_reads_a_fixed_place_is_padded(tmp_path):
    assert freeze(toy.loaded("bert", tmp_path / "bert"), EXACT, "cpu").first is None


@pytest.mark.parametrize("family", ["RobertaConfig", "DistilBertConfig", "ElectraConfig"])
def test_a_trial_decides_where_positions_begin(family, tmp_path):
    """RoBERTa counts from its padding's id on; whatever a model does, packed rows mean what padded ones do."""
    import transformers

    sizes = {
        "vocab_size": 260,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    if family == "DistilBertConfig":
        sizes = {"vocab_size": 260, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
    config = getattr(transformers, family)(max_position_embeddings=64, pad_token_id=0, **sizes)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    toy.encoder().tokenizer.save_pretrained(tmp_path)
    settings = toy.settings(model={"name": str(tmp_path), "pooling": "mean"}, local={"max_length": 16})
    model = models.load(settings, toy.LABELS)
    data, frozen = toy.encoded("train"), freeze(model, EXACT, "cpu")
    assert frozen.first == {"RobertaConfig": 1, "DistilBertConfig": 0, "ElectraConfig": 0}[family]
    found = passed(frozen, model, data, np.arange(6))[0]
    frozen.first = None
    assert found == pytest.approx(passed(frozen, model, data, np.arange(6))[0], rel=1e-4)


@pytest.fixture
def draws() -> torch.Generator:
    return torch.Generator().manual_seed(0)


WAYS = [packing.Attention.apply, packing.plainly]


@pytest.mark.parametrize("attend", WAYS)
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 5), (True, 40)])
@pytest.mark.parametrize("lengths", [[4, 9, 1], [16, 16], [7], [20, 20, 9, 33, 70, 3, 65]])
def test_attention_is_that_of_each_row_to_itself(lengths, causal, window, attend, draws):
    packed = packing.pack(np.array(lengths), [len(lengths)], "cpu")
    heads, width = 3, 8
    q, k, v = (
        torch.randn(heads, packed.filled, width, generator=draws, dtype=torch.float64).requires_grad_()
        for _ in range(3)
    )
    found = attend(q, k, v, packed, causal, window, 0.5, 0.0)[packed.at]
    weight = torch.randn(found.shape, generator=draws, dtype=torch.float64)
    ours = torch.autograd.grad((found * weight).sum(), (q, k, v))
    expected, at = list[torch.Tensor](), 0
    for length in lengths:
        part = [x[:, at : at + length] for x in (q, k, v)]
        back = torch.arange(length)[:, None] - torch.arange(length)  # how far the token that is read lies back
        seen = (back >= 0 if causal else back == back) & (back < (window or length))
        own = torch.nn.functional.scaled_dot_product_attention(*(x[None] for x in part), attn_mask=seen, scale=0.5)
        expected.append(own[0].transpose(0, 1))
        at += length
    torch.testing.assert_close(found, torch.cat(expected))
    theirs = torch.autograd.grad((torch.cat(expected) * weight).sum(), (q, k, v))
    for a, b in zip(ours, theirs, strict=True):  # nothing of tokens that fill up
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("attend", WAYS)
def test_attention_drops_shares_and_its_gradient_knows_which(attend, draws):
    packed = packing.pack(np.array([6, 3]), [2], "cpu")
    q, k, v = (
        torch.randn(2, packed.filled, 4, generator=draws, dtype=torch.float64).requires_grad_() for _ in range(3)
    )

    def drop(*parts: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return attend(*parts, packed, False, None, 0.5, 0.4)[packed.at]

    with torch.random.fork_rng():
        assert torch.autograd.gradcheck(drop, (q, k, v), nondet_tol=0.0)
        if attend is packing.plainly:
            assert torch.autograd.gradgradcheck(drop, (q, k, v), nondet_tol=0.0)
        whole = attend(q, k, v, packed, False, None, 0.5, 0.0)[packed.at]
        assert not torch.allclose(drop(q, k, v), whole)


@pytest.mark.parametrize("name", ["softcap", "position_bias"])
def test_attention_that_is_more_than_that_is_refused(name):
    """Short rows would not show it: the trial has to fail."""
    parts = [torch.zeros(1, 2, 32, 4) for _ in range(3)]
    with packing.attention(toy.encoder().base, packing.pack(np.array([3]), [1], "cpu")):
        packing.attend(torch.nn.Module(), *parts, None)
        with pytest.raises(ValueError, match=name):
            packing.attend(torch.nn.Module(), *parts, None, **{name: 4})


@pytest.mark.parametrize(
    ("lengths", "counts", "sizes"),
    [
        ([10, 20, 13], [3], [64]),  # 43 tokens of one client, to a multiple of 32
        ([10, 20, 13, 45], [3, 1], [48, 48]),  # 43 and 45: alike, to a multiple of 8
        ([60, 40, 40], [1, 1, 1], [64, 64, 64]),  # 192 places, where each by itself takes as many
        ([64, 40, 33], [1, 1, 1], [64, 64, 64]),
        ([90, 10, 10], [1, 1, 1], [96, 32, 32]),  # 288 alike would be too many
        ([300, 290, 280], [1, 1, 1], [304, 304, 304]),
    ],
)
def test_clients_are_filled_up_alike_where_that_takes_little(lengths, counts, sizes):
    at, found = packing.layout(np.array(lengths), counts)
    assert found == sizes
    begins = np.cumsum(found) - found
    owner = np.repeat(np.repeat(np.arange(len(counts)), counts), lengths)
    own = [np.arange(total) for total in np.bincount(owner)]
    np.testing.assert_array_equal(at, begins[owner] + np.concatenate(own))


@pytest.mark.parametrize("lengths", [[4, 9, 1, 7, 7, 30], [40, 3, 3, 3, 3, 41], [33, 33, 33, 33, 33, 70]])
@pytest.mark.parametrize("counts", [[1, 2, 3], [3, 3], [2, 1, 2, 1]])
def test_whatever_one_client_reads_is_its_own(lengths, counts):
    """In its tiles and where it is only filled up: no number of another one's, as it may be none."""
    packed = packing.pack(np.array(lengths), counts, "cpu")
    sizes = packing.layout(np.array(lengths), counts)[1]
    client, row = np.repeat(np.arange(len(counts)), sizes), np.repeat(np.arange(len(counts)), counts)
    for tiles in packed.tiles:
        read = client[tiles.tokens.view(tiles.owner.shape)]
        for owner, clients in zip(tiles.owner.numpy(), read, strict=True):
            here = np.unique(row[owner[owner >= 0]])
            assert len(here) <= 1
            assert not len(here) or (clients == here[0]).all()
    written = np.concatenate([client[tiles.tokens] for tiles in packed.tiles])
    np.testing.assert_array_equal(written[packed.places], client)
