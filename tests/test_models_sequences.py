"""Models of sequences: their formulas row by row, without padding, and what every model promises."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, logsigmoid

import models
from models.bst import Block
from models.dien import Recurrence
from models.model import Sequences, WithLoss
from models.norm import BatchNorm

FIELDS = tuple(models.Field(*names) for names in (("t", "item"), ("u", "user"), ("t", "category")))
HISTORY = (models.Field("t", "items"), models.Field("t", "categories"))
NEGATIVES = (models.Field("t", "other_items"), models.Field("t", "other_categories"))
NAMED = {"target": ["item", "category"], "history": ["items", "categories"]}
DEEP = {"hidden": [5, 3]} | NAMED
TOLD = DEEP | {"negatives": ["other_items", "other_categories"]}
VARIANTS = [
    ("din", DEEP),
    ("din", DEEP | {"attention": "softmax", "attention_activation": "prelu", "batch_norm": True, "dropout": 0.1}),
    ("din", DEEP | {"attention": "mean", "activation": "dice"}),
    ("din", DEEP | {"attention_hidden": [], "init": "xavier_normal"}),
    ("dien", DEEP),
    ("dien", TOLD | {"auxiliary_weight": 0.3, "activation": "dice"}),
    ("bst", DEEP),
    ("bst", DEEP | {"heads": 2, "blocks": 2, "positions": 3, "dropout": 0.1, "activation": "silu"}),
]
variants = pytest.mark.parametrize(("kind", "options"), VARIANTS)
LENGTHS = (3, 0, 5, 1, 2, 4)
Inputs = tuple[Tensor, Tensor, Tensor, Sequences]


def make(kind: str, options: dict, num_dense: int = 2) -> models.CTRModel:
    sequences = HISTORY + NEGATIVES if "negatives" in options else HISTORY
    return models.build(kind, num_dense=num_dense, num_fields=3, dim=4, fields=FIELDS, sequences=sequences, **options)


def inputs(options: dict, lengths: tuple[int, ...] = LENGTHS, num_dense: int = 2, longest: int = 5) -> Inputs:
    """Random rows; also where a sequence has ended, as masks must keep those out."""
    rows, num_sequences = len(lengths), 4 if "negatives" in options else 2
    lengths_BS = torch.tensor(lengths, dtype=torch.int64).unsqueeze(1).expand(rows, num_sequences)
    sequences = Sequences(torch.randn(rows, num_sequences, longest, 4), lengths_BS)
    return torch.randn(rows, num_dense), torch.randn(rows, 3, 4), torch.randn(rows, 0), sequences


def cut(batch: Inputs, rows: slice, longest: int) -> Inputs:
    """Some rows of a batch, and the first ``longest`` of their sequences."""
    *tensors, sequences = batch
    dense, embeddings, linear = (tensor[rows] for tensor in tensors)
    return dense, embeddings, linear, Sequences(sequences.rows_BSLD[rows, :, :longest], sequences.lengths_BS[rows])


def logits_and_loss(out: Tensor | WithLoss) -> tuple[Tensor, Tensor]:
    return (out.logits_B, out.loss_B) if isinstance(out, WithLoss) else (out, torch.zeros_like(out))


def oracle_inputs(batch: Inputs, row: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The target of a row, its history and its negatives, item by item: [W] each."""
    _, embeddings, _, sequences = batch
    length = int(sequences.lengths_BS[row, 0])
    of_row = sequences.rows_BSLD[row]
    pairs = [
        [torch.cat([of_row[s, place], of_row[s + 1, place]]) for place in range(length)]
        for s in range(0, len(of_row), 2)
    ]
    return torch.cat([embeddings[row, 0], embeddings[row, 2]]), pairs[0], pairs[-1]


def with_interest(model: models.CTRModel, batch: Inputs, row: int, interest: Tensor) -> Tensor:
    x = torch.cat([batch[1][row].flatten(), interest, batch[0][row]])
    return model.mlp(x.unsqueeze(0))[0]


def oracle_din(model: models.CTRModel, batch: Inputs, row: int) -> Tensor:
    target, history, _ = oracle_inputs(batch, row)
    if model.attention == "mean":
        weights = [torch.tensor(1 / len(history)) for _ in history]
    else:
        weights = [model.unit.mlp(torch.cat([target, h, target - h, target * h]).unsqueeze(0))[0] for h in history]
    if model.attention == "softmax":
        total = sum(math.exp(weight / math.sqrt(8)) for weight in weights)
        weights = [torch.tensor(math.exp(weight / math.sqrt(8)) / total) for weight in weights]
    interest = sum((weight * h for weight, h in zip(weights, history, strict=True)), torch.zeros(8))
    return with_interest(model, batch, row, interest)


def oracle_recurrence(unit: nn.Module, rows: list[Tensor], attention: list[float]) -> list[Tensor]:
    (w_u, w_r, w_c), (u_u, u_r, u_c) = unit.inputs.weight.chunk(3), unit.state.weight.chunk(3)
    (a_u, a_r, a_c), (b_u, b_r, b_c) = unit.inputs.bias.chunk(3), unit.state.bias.chunk(3)
    h, states = torch.zeros(8), []
    for x, a in zip(rows, attention, strict=True):
        u = a * torch.sigmoid(w_u @ x + a_u + u_u @ h + b_u)
        r = torch.sigmoid(w_r @ x + a_r + u_r @ h + b_r)
        c = torch.tanh(w_c @ x + a_c + r * (u_c @ h + b_c))
        h = (1 - u) * h + u * c
        states.append(h)
    return states


def oracle_dien(model: models.CTRModel, batch: Inputs, row: int) -> tuple[Tensor, Tensor]:
    target, history, others = oracle_inputs(batch, row)
    interests = oracle_recurrence(model.extractor, history, [1.0] * len(history))
    near = [float(i @ model.nearness.weight @ target) for i in interests]
    attention = [math.exp(n) / sum(map(math.exp, near)) for n in near]
    states = oracle_recurrence(model.evolution, interests, attention)
    loss = torch.zeros(())
    for place in range(len(history) - 1):
        loss -= logsigmoid(interests[place] @ history[place + 1])
        loss -= torch.log(1 - torch.sigmoid(interests[place] @ others[place + 1]))
    return with_interest(model, batch, row, states[-1] if states else torch.zeros(8)), loss * model.auxiliary_weight


def oracle_block(block: Block, rows: list[Tensor]) -> list[Tensor]:
    heads, wide, out = block.heads, 8 // block.heads, []
    for asking in rows:
        found = []
        for head in range(heads):
            columns = slice(head * wide, (head + 1) * wide)
            scores = [float(block.query(asking)[columns] @ block.key(row)[columns]) / math.sqrt(wide) for row in rows]
            total = sum(map(math.exp, scores))
            found.append(
                sum(math.exp(s) / total * block.value(row)[columns] for s, row in zip(scores, rows, strict=True))
            )
        own = block.attention_norm(asking + block.found(torch.cat(found)))
        out.append(block.outer_norm(own + block.outer(leaky_relu(block.inner(own)))))
    return out


def oracle_bst(model: models.CTRModel, batch: Inputs, row: int) -> Tensor:
    target, history, _ = oracle_inputs(batch, row)
    most, positions = model.positions.num_embeddings - 1, model.positions.weight
    rows = [h + positions[min(len(history) - place, most)] for place, h in enumerate(history)]
    rows.append(target + positions[0])
    for block in model.blocks:
        rows = oracle_block(block, rows)
    return with_interest(model, batch, row, rows[-1])


def scramble(model: nn.Module) -> None:
    """Random parameters and statistics, as zeros would hide them."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if "running_var" in name else torch.randn_like(tensor) * 0.5)


@pytest.fixture(autouse=True)
def in_double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@variants
@torch.no_grad()
def test_a_score_is_the_papers_formula_row_by_row_without_padding(kind, options):
    model, batch = make(kind, options).eval(), inputs(options)
    scramble(model)
    expected = [
        oracle_din(model, batch, row)
        if kind == "din"
        else oracle_dien(model, batch, row)[0]
        if kind == "dien"
        else oracle_bst(model, batch, row)
        for row in range(len(LENGTHS))
    ]
    torch.testing.assert_close(model(*batch), torch.stack(expected).to(torch.float64))


@torch.no_grad()
def test_the_auxiliary_loss_tells_the_next_item_from_another_one_row_by_row():
    options = TOLD | {"auxiliary_weight": 0.3}
    model, batch = make("dien", options), inputs(options)
    scramble(model)
    logits, loss = logits_and_loss(model(*batch))
    expected = [oracle_dien(model, batch, row) for row in range(len(LENGTHS))]
    torch.testing.assert_close(logits, torch.stack([logit for logit, _ in expected]))
    torch.testing.assert_close(loss.double(), torch.stack([own for _, own in expected]), rtol=1e-5, atol=1e-6)
    assert not loss[[1, 3]].any()  # nothing comes next
    assert isinstance(model.eval()(*batch), Tensor)


@variants
def test_neither_scores_nor_gradients_nor_statistics_depend_on_the_padding(kind, options):
    model, batch = make(kind, options | ({"dropout": 0.0} if "dropout" in options else {})), inputs(options, longest=9)
    scramble(model)
    found = []
    for longest in (9, 5):
        own, (dense, embeddings, linear, sequences) = copy.deepcopy(model), cut(batch, slice(None), longest)
        rows = sequences.rows_BSLD.clone().requires_grad_()
        logits, loss = logits_and_loss(own(dense, embeddings, linear, Sequences(rows, sequences.lengths_BS)))
        (logits.square().sum() + loss.sum()).backward()
        gradients = {name: parameter.grad for name, parameter in own.named_parameters()}
        assert rows.grad is not None
        assert not rows.grad[:, :, 5:].any()
        found.append((logits, loss, rows.grad[:, :, :5], gradients, dict(own.named_buffers())))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9)


@variants
def test_what_lies_beyond_a_sequence_gets_no_gradient(kind, options):
    model, (dense, embeddings, linear, sequences) = make(kind, options), inputs(options)
    rows = sequences.rows_BSLD.requires_grad_()
    logits, loss = logits_and_loss(model(dense, embeddings, linear, sequences))
    (logits.sum() + loss.sum()).backward()
    for row, length in enumerate(LENGTHS):
        assert not rows.grad[row, :, length:].any()
    assert rows.grad[2, :2].abs().sum(dim=2).all()


@variants
@pytest.mark.parametrize("num_dense", [0, 2])
@pytest.mark.parametrize("lengths", [(), (0,), (1,), (0, 0, 0), LENGTHS])
def test_any_rows_and_histories_give_every_parameter_a_finite_gradient(kind, options, num_dense, lengths):
    torch.set_default_dtype(torch.float32)
    model = make(kind, options, num_dense)
    logits, loss = logits_and_loss(model(*inputs(options, lengths, num_dense, longest=max(1, *lengths, 1))))
    assert logits.shape == loss.shape == (len(lengths),)
    assert logits.dtype == loss.dtype == torch.float32
    (logits.sum() + loss.sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert lengths or not parameter.grad.any(), name


@variants
def test_evaluation_scores_each_row_alone_with_a_history_of_its_own_length(kind, options):
    model, batch = make(kind, options), inputs(options)
    model(*batch)
    model.eval()
    alone = [model(*cut(batch, slice(row, row + 1), max(1, length))) for row, length in enumerate(LENGTHS)]
    torch.testing.assert_close(model(*batch), torch.cat(alone))


def test_a_long_recurrence_that_attention_slows_is_as_near_under_autocast_as_a_short_one():
    torch.manual_seed(3)
    unit, rows = Recurrence(16).float(), torch.randn(64, 1000, 16, dtype=torch.float32)
    mask = torch.ones(64, 1000, dtype=torch.bool)
    attention = mask.float() / 1000
    with torch.no_grad():
        exact = unit(rows, mask, attention)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = unit(rows, mask, attention)
    assert found.dtype == torch.float32
    assert (found[:, -1] - exact[:, -1]).norm() < 2**-8 * exact[:, -1].norm()  # half a unit in bfloat16's last place


@variants
def test_logits_are_float32_under_autocast(kind, options):
    torch.set_default_dtype(torch.float32)
    model, batch = make(kind, options), inputs(options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss = logits_and_loss(model(*batch))
    assert logits.dtype == loss.dtype == torch.float32
    (logits.sum() + loss.sum()).backward()


@variants
def test_every_normalization_over_rows_is_one_that_can_be_synchronized(kind, options):
    norms = [module for module in make(kind, options).modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    assert all(isinstance(norm, BatchNorm) for norm in norms)


def test_mean_pooling_is_attention_without_its_unit():
    names = set(make("din", DEEP).state_dict())
    assert {name for name in names if not name.startswith("unit.")} == set(
        make("din", DEEP | {"attention": "mean"}).state_dict()
    )


def build(kind: str, fields: list[tuple[str, str]], sequences: list[tuple[str, str]], **options) -> models.CTRModel:
    return models.build(
        kind,
        num_dense=0,
        num_fields=len(fields),
        dim=3,
        fields=[models.Field(*names) for names in fields],
        sequences=[models.Field(*names) for names in sequences],
        **{"hidden": [3]} | options,
    )


def test_the_target_of_a_history_is_the_only_pooled_feature_of_its_table():
    model = build("din", [("u", "user"), ("c", "cat"), ("t", "item")], [("t", "items"), ("c", "cats")])
    assert (model.target_places, model.history_places, model.equally_long) == ([2, 1], [0, 1], ("items", "cats"))


def test_a_pair_that_several_tables_embed_is_read_from_each():
    both = [("a", "item"), ("a", "user"), ("b", "item"), ("b", "user")]
    model = build("bst", both, [("a", "items"), ("b", "items")], target=["item"], positions=2)
    assert (model.target_places, model.history_places, model.width) == ([0, 2], [0, 1], 6)


ONE, ITEMS = [("t", "item")], [("t", "items")]
TWO, CATS = [*ONE, ("c", "cat")], [*ITEMS, ("c", "cats")]
WRONG = [
    ("din", ONE, [], {}, r"the model needs a history: name features of lists in tables\[\].sequences"),
    ("din", [*ONE, ("t", "b")], ITEMS, {}, "target must say what 'items' is the history of; .*: 'item', 'b'"),
    ("din", [("u", "item")], ITEMS, {}, "what 'items' is the history of; beside it in its table: none"),
    (
        "din",
        TWO,
        ITEMS,
        {"target": ["cat"]},
        "target of 'items', which must be .* of table 't': 'cat'; There are: item",
    ),
    ("din", ONE, ITEMS, {"target": ["itme"]}, "target.*'itme'; did you mean 'item'"),
    ("din", ONE, ITEMS, {"target": "item"}, "target='item' must be a list of names"),
    ("din", ONE, ITEMS, {"history": ["itms"]}, "history.*'itms'; did you mean 'items'"),
    ("din", TWO, ITEMS, {"target": ["item", "cat"]}, r"target=\['item', 'cat'\] must have one feature for each"),
    ("din", ONE, [*ITEMS, ("t", "b")], {"history": ["items"]}, "sequence 'b' must be in one of the model options"),
    ("dien", ONE, ITEMS, {"history": ["items"], "negatives": ["items"]}, "sequence 'items' must be in one of"),
    ("dien", ONE, ITEMS, {"auxiliary_weight": 0}, "auxiliary_weight=0 must be a number above 0"),
    ("dien", ONE, ITEMS, {"auxiliary_weight": 0.5}, "auxiliary_weight=0.5 needs negatives: name sequences"),
    ("dien", TWO, [*CATS, ("t", "b")], {"negatives": ["b"]}, r"negatives=\['b'\] must have one sequence for each"),
    ("dien", TWO, [*ITEMS, ("c", "b")], {"negatives": ["b"]}, "one sequence for each of .*, of the same table"),
    ("din", ONE, ITEMS, {"attention": "max"}, "attention: 'max'; .*There are: unit, softmax, mean"),
    ("bst", ONE, ITEMS, {"heads": 2}, "heads=2 must divide the 3 columns of target and history, which are 1 of 3"),
    ("bst", ONE, ITEMS, {"positions": 0}, "positions=0 must be a whole number of at least 1"),
]


@pytest.mark.parametrize(("kind", "fields", "sequences", "options", "message"), WRONG)
def test_what_does_not_pair_up_is_named_with_what_is_right(kind, fields, sequences, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(kind, fields, sequences, **options)
    assert "\n" not in str(caught.value)
