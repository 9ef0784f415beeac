"""What every model promises: its names, its shapes, its options, and gradients with any number of rows."""

import copy

import pytest
import torch
from torch import Tensor, nn

import models
from models.norm import BatchNorm

DEEP = {"hidden": [5, 3]}
STREAMS = {"hidden1": [5, 4], "hidden2": [4]}
FIELDS = (models.Field("a", "item"), models.Field("a", "user"), models.Field("a", "hour"), models.Field("b", "user"))
VARIANTS = [
    ("lr", {}),
    ("fm", {}),
    ("fm", {"linear": "projection"}),
    ("dnn", DEEP),
    ("dnn", {"hidden": []}),
    ("dnn", DEEP | {"activation": "dice"}),
    ("dnn", DEEP | {"activation": "prelu", "batch_norm": True, "dropout": 0.1}),
    ("deepfm", DEEP | {"activation": "gelu", "init": "xavier_normal"}),
    ("deepfm", DEEP | {"linear": "projection"}),
    ("deepfm", DEEP | {"linear": "none", "activation": "silu"}),
    ("dcn", DEEP),
    ("dcnv2", DEEP | {"structure": "stacked"}),
    ("dcnv2", DEEP | {"rank": 2}),
    ("wide_deep", DEEP),
    ("xdeepfm", DEEP | {"cin": [4, 3]}),
    ("xdeepfm", DEEP | {"cin": [4, 2, 3], "split_half": True, "linear": "none", "init": "xavier_normal"}),
    ("finalmlp", STREAMS | {"gate1": ["user"], "heads": 2}),
    ("finalmlp", STREAMS | {"gate1": ["user"], "gate2": ["user"], "gate_tables": ["b"], "gate_hidden": []}),
    ("finalmlp", STREAMS | {"gates": False, "batch_norm1": True, "dropout2": 0.1, "init": "xavier_normal"}),
    ("pnn", DEEP),
    ("pnn", DEEP | {"product": "outer"}),
    ("pnn", DEEP | {"product": "both"}),
    ("fnn", DEEP),
    ("fnn", DEEP | {"linear": "projection"}),
    ("autoint", {"dropout": 0.1, "init": "xavier_normal"}),
    ("autoint", {"hidden": [5], "linear": "table", "scale": True, "layer_norm": True, "heads": 3, "head_dim": 1}),
    ("dlrm", DEEP),
    ("dlrm", DEEP | {"bottom": [4], "batch_norm": True}),
    ("dcnv2", DEEP | {"rank": 2, "experts": 3}),
    ("deepfm", DEEP | {"deep_tables": ["b"], "linear": "projection"}),
    ("deepfm", DEEP | {"deep_tables": ["a"], "combine": "two_towers", "activation": "silu"}),
    ("deepfm", DEEP | {"combine": "two_towers", "linear": "none", "activation": "silu", "combine_hidden": [5, 2]}),
]
TASKS = ("click", "buy")
TASK_VARIANTS = [
    ("shared_bottom", DEEP | {"tower": [4]}),
    ("mmoe", DEEP | {"experts": 3, "tower": [4], "batch_norm": True, "init": "xavier_normal"}),
    ("mmoe", DEEP | {"experts": 2, "gate": [3], "dropout": 0.1}),
    ("ple", DEEP | {"task_experts": 1, "shared_experts": 2}),
    ("ple", DEEP | {"levels": 2, "task_experts": 2, "shared_experts": 1, "tower": [4], "gate": [3]}),
    ("esmm", DEEP),
]
VARIANTS += TASK_VARIANTS
NORMS = ("batch_norm", "batch_norm1", "batch_norm2")
variants = pytest.mark.parametrize(("kind", "options"), VARIANTS)


def make(kind: str, options: dict, num_dense: int = 2) -> models.CTRModel:
    tasks = TASKS if kind in {name for name, _ in TASK_VARIANTS} else TASKS[:1]
    sizes = {"num_dense": num_dense, "num_fields": 4, "dim": 3, "tasks": tasks}
    return models.build(kind, **sizes, fields=FIELDS, linear_fields=FIELDS, **options)


def inputs(rows: int, num_dense: int = 2, num_linear: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rows, num_dense), torch.randn(rows, 4, 3), torch.randn(rows, num_linear)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_deepfm_has_exactly_the_public_names_and_shapes():
    model = models.build("deepfm", num_dense=0, num_fields=47, dim=15, hidden=[64, 32], linear="table")
    assert shapes(model) == {
        "linear.bias": (1,),
        "mlp.mlp.0.weight": (64, 705),
        "mlp.mlp.0.bias": (64,),
        "mlp.mlp.2.weight": (32, 64),
        "mlp.mlp.2.bias": (32,),
        "mlp.mlp.4.weight": (1, 32),
        "mlp.mlp.4.bias": (1,),
    }


def test_dnn_with_dice_has_exactly_the_public_names_and_shapes():
    model = models.build("dnn", num_dense=0, num_fields=47, dim=15, hidden=[128, 64, 32], activation="dice")
    expected: dict[str, tuple[int, ...]] = {}
    for place, (width_in, width_out) in enumerate([(705, 128), (128, 64), (64, 32)]):
        linear, dice = f"mlp.mlp.{2 * place}", f"mlp.mlp.{2 * place + 1}"
        expected |= {f"{linear}.weight": (width_out, width_in), f"{linear}.bias": (width_out,)}
        expected |= {f"{dice}.alpha": (width_out,), f"{dice}.bn.num_batches_tracked": ()}
        expected |= {f"{dice}.bn.{name}": (width_out,) for name in ("weight", "bias", "running_mean", "running_var")}
    assert shapes(model) == expected | {"mlp.mlp.6.weight": (1, 32), "mlp.mlp.6.bias": (1,)}


def test_cross_networks_have_the_public_names_and_shapes():
    width, head = 4 * 3 + 2, {"head.weight": (1, 17), "head.bias": (1,)}
    deep = {"mlp.mlp.0.weight": (5, width), "mlp.mlp.0.bias": (5,), "mlp.mlp.2.weight": (3, 5), "mlp.mlp.2.bias": (3,)}
    of_kind = {
        "dcn": ({}, {"weight": (width,), "bias": (width,)}),
        "dcnv2": ({"rank": 2}, {"u": (width, 2), "v": (width, 2), "bias": (width,)}),
    }
    for kind, (options, layer) in of_kind.items():
        cross = {f"cross.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
        assert shapes(make(kind, DEEP | options | {"cross_layers": 2})) == cross | deep | head


@pytest.mark.parametrize("kind", ["lr", "fm", "deepfm", "wide_deep"])
def test_dense_features_have_first_order_weights_where_there_are_any(kind):
    options = {} if kind in ("lr", "fm") else DEEP
    assert shapes(make(kind, options, num_dense=2))["linear.dense.weight"] == (1, 2)
    assert "linear.dense.weight" not in shapes(make(kind, options, num_dense=0))


def test_what_is_off_adds_no_module_and_what_is_on_keeps_its_order():
    full = make("dnn", {"hidden": [5], "batch_norm": True, "dropout": 0.5}).mlp.mlp
    assert [type(module).__name__ for module in full] == ["Linear", "BatchNorm", "ReLU", "Dropout", "Logit"]
    bare = make("dnn", {"hidden": [5], "batch_norm": False, "dropout": 0}).mlp.mlp
    assert [type(module).__name__ for module in bare] == ["Linear", "ReLU", "Logit"]


def test_layer_norm_is_of_each_row_before_its_activation():
    model = make("dnn", {"hidden": [5], "layer_norm": True, "dropout": 0.5}).mlp.eval()
    assert [type(module).__name__ for module in model.mlp] == ["Linear", "LayerNorm", "ReLU", "Dropout", "Logit"]
    first, norm, *_, last = model.mlp
    with torch.no_grad():
        norm.weight.uniform_(-2, 2)
        norm.bias.uniform_(-1, 1)
    x = torch.randn(6, first.in_features)
    expected = []
    for row in first(x):
        centred = row - row.mean()
        normed = centred / (centred.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias
        expected.append(last.weight[0] @ normed.clamp(min=0) + last.bias[0])
    torch.testing.assert_close(model(x), torch.stack(expected))


@variants
def test_the_terms_of_a_logit_add_up_to_it(kind, options):
    torch.manual_seed(0)
    model, batch = make(kind, options).eval(), inputs(5)
    terms = model.terms(*batch)
    logits = model(*batch)
    assert all(term.shape == logits.shape for term in terms.values())
    torch.testing.assert_close(sum(terms.values()), logits)


@variants
def test_every_normalization_is_one_that_can_be_synchronized(kind, options):
    norms = [module for module in make(kind, options).modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    assert all(isinstance(norm, BatchNorm) for norm in norms)
    assert bool(norms) == (options.get("activation") == "dice" or any(options.get(name) for name in NORMS))


@variants
@pytest.mark.parametrize("num_dense", [0, 2])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_any_number_of_rows_gives_every_parameter_a_finite_gradient(kind, options, num_dense, rows):
    model = make(kind, options, num_dense)
    logits = model(*inputs(rows, num_dense))
    assert logits.shape == ((rows, 2) if (kind, options) in TASK_VARIANTS else (rows,))
    assert logits.dtype == torch.float32
    logits.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert rows or not parameter.grad.any(), name


@variants
def test_evaluation_scores_each_row_alone(kind, options):
    model, batch = make(kind, options), inputs(6)
    model(*batch)
    model.eval()
    alone = [model(*(tensor[row : row + 1] for tensor in batch)) for row in range(6)]
    torch.testing.assert_close(model(*batch), torch.cat(alone))
    assert len(model(*(tensor[:0] for tensor in batch))) == 0


@variants
def test_inputs_that_a_model_says_it_does_not_use_do_not_matter(kind, options):
    reads_linear = reads_embeddings = False
    for _ in range(8):  # of some models all few units may be dead
        model, (dense, embeddings, linear) = make(kind, options).eval(), inputs(5)
        logits = model(dense, embeddings, linear)
        reads_linear |= not torch.equal(model(dense, embeddings, torch.randn(5, 4)), logits)
        reads_embeddings |= not torch.equal(model(dense, torch.randn(5, 4, 3), linear), logits)
    assert reads_linear == (models.linear_source(kind, options) == "table")
    assert reads_embeddings == model.NEEDS_EMBEDDINGS


def test_a_run_without_first_order_tables_has_no_first_order_weights_to_add():
    model, (dense, embeddings, _) = make("fm", {}), inputs(5)
    without = model(dense, embeddings, torch.empty(5, 0))
    assert torch.equal(without, model(dense, embeddings, torch.zeros(5, 4)))


@variants
def test_logits_are_float32_under_autocast(kind, options):
    model, batch = make(kind, options), inputs(64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(*batch)
    assert logits.dtype == torch.float32
    logits.sum().backward()


@variants
def test_a_model_compiles_whole_for_any_number_of_rows(kind, options):
    torch.manual_seed(0)
    model = make(kind, options | {name: 0.0 for name in options if name.startswith("dropout")})
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True, dynamic=True)
    for rows in (7, 4):
        batch = inputs(rows)
        torch.testing.assert_close(compiled(*batch), model(*batch))
    torch.testing.assert_close(dict(compiled._orig_mod.named_buffers()), dict(model.named_buffers()))
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["dnn", "deepfm", "wide_deep", "dcn", "dcnv2", "autoint", "pnn", "dlrm"])
def test_the_output_layer_starts_as_the_others_do(kind):
    model = make(kind, DEEP | {"init": "xavier_normal"})
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module.bias is not None]
    assert any(layer.out_features == 1 for layer in layers)
    assert not any(layer.bias.any() for layer in layers)


@pytest.mark.parametrize("init", ["xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal"])
def test_initial_weights_have_the_spread_that_their_name_says(init):
    torch.manual_seed(0)
    layer = models.build("dnn", num_dense=0, num_fields=20, dim=20, hidden=[300], init=init).mlp.mlp[0]
    variance = 2 / (400 + 300) if init.startswith("xavier") else 2 / 400
    assert layer.weight.var().item() == pytest.approx(variance, rel=0.05)
    assert not layer.bias.any()


def test_models_learn_a_cross_of_two_fields():
    """Neither field says anything of the label alone; only their product does."""
    torch.manual_seed(0)
    signs = torch.randint(0, 2, (512, 2)) * 2.0 - 1
    labels, embeddings = (signs.prod(dim=1) > 0).float(), signs.unsqueeze(2).repeat(1, 1, 3)
    for kind in ("dnn", "dcn", "dcnv2"):
        model = models.build(kind, num_dense=0, num_fields=2, dim=3, hidden=[8])
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(60):
            optimizer.zero_grad()
            logits = model(torch.empty(512, 0), embeddings, torch.empty(512, 0))
            nn.functional.binary_cross_entropy_with_logits(logits, labels).backward()
            optimizer.step()
        assert ((logits > 0) == labels.bool()).all(), kind


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("deepmf", {}, "unknown model kind 'deepmf'; did you mean 'deepfm'"),
        ("zzz", {}, f"unknown model kind 'zzz'; There are: {', '.join(models.MODELS)}$"),
        ("dnn", {"hiden": [3]}, "unknown option for model kind 'dnn': 'hiden'; did you mean 'hidden'"),
        ("dcn", DEEP | {"rank": 2}, "unknown option for model kind 'dcn': 'rank'; .*There are: cross_layers"),
        ("lr", {"hidden": [3]}, "unknown option for model kind 'lr': 'hidden'; There are: linear$"),
        ("deepfm", {}, "model kind 'deepfm' needs the option hidden"),
        ("dnn", DEEP | {"activation": "rellu"}, "model option activation: 'rellu'; did you mean 'relu'"),
        ("dnn", DEEP | {"activation": ["relu"]}, "model option activation: .*There are: relu, prelu, dice"),
        ("dnn", DEEP | {"init": "xavier"}, "model option init: 'xavier'; did you mean 'xavier_normal'"),
        ("dnn", {"hidden": [64, 0]}, r"hidden\[1\]=0 must be a whole number of at least 1"),
        ("dnn", {"hidden": [64, 1.5]}, r"hidden\[1\]=1.5 must be a whole number"),
        ("dnn", {"hidden": [True]}, r"hidden\[0\]=True must be a whole number"),
        ("dnn", {"hidden": "64"}, "hidden='64' must be a list of layer widths"),
        ("dnn", {"hidden": 64}, "hidden=64 must be a list of layer widths"),
        ("dnn", DEEP | {"dropout": 1.0}, "dropout=1.0 must be a number from 0 up to, but not including, 1"),
        ("dnn", DEEP | {"dropout": "0.1"}, "dropout='0.1' must be a number"),
        ("dnn", DEEP | {"dropout": float("nan")}, "dropout=nan must be a number"),
        ("dnn", DEEP | {"batch_norm": 1}, "batch_norm=1 must be true or false"),
        ("dnn", DEEP | {"layer_norm": 1}, "layer_norm=1 must be true or false"),
        ("dnn", DEEP | {"batch_norm": True, "layer_norm": True}, "batch_norm and layer_norm are both true"),
        ("deepfm", DEEP | {"linear": "tabel"}, "model option linear: 'tabel'; did you mean 'table'"),
        ("fm", {"linear": "none"}, "model option linear: 'none'; .*There are: table, projection$"),
        ("lr", {"linear": "projection"}, "model option linear: 'projection'; There are: table$"),
        ("wide_deep", DEEP | {"linear": "none"}, "model option linear: 'none'; .*There are: table$"),
        ("dcn", DEEP | {"cross_layers": 0}, "cross_layers=0 must be a whole number of at least 1"),
        ("dcnv2", DEEP | {"cross_layers": "3"}, "cross_layers='3' must be a whole number"),
        ("dcnv2", DEEP | {"rank": 0}, "rank=0 must be a whole number of at least 1"),
        ("dcnv2", DEEP | {"rank": 14}, "rank=14 must be less than the model's 14 inputs; leave it out for full rank"),
        ("dcnv2", DEEP | {"structure": "stack"}, "model option structure: 'stack'; did you mean 'stacked'"),
        ("dcn", {"hidden": []}, r"hidden=\[\] leaves nothing beside the cross layers; .*structure='stacked'"),
        ("dcnv2", {"hidden": []}, r"hidden=\[\] leaves nothing beside the cross layers"),
        ("dcnv2", DEEP | {"experts": 2}, "experts=2 needs the option rank, the width of each expert"),
        ("dcnv2", DEEP | {"rank": 2, "experts": 0}, "experts=0 must be a whole number of at least 1"),
        ("deepfm", DEEP | {"deep_tables": ["a", "b"]}, "deep_tables names all tables of embeddings; leave one for"),
        ("deepfm", DEEP | {"deep_tables": ["a", "a"]}, r"deep_tables=\['a', 'a'\] must be a list of names, each once"),
        ("deepfm", DEEP | {"deep_tables": [3]}, r"model option deep_tables\[0\]: 3; There are: a, b$"),
        ("deepfm", DEEP | {"combine": "add"}, "model option combine: 'add'; There are: sum, two_towers$"),
        ("deepfm", DEEP | {"combine_hidden": [4]}, "combine_hidden is of combine = 'two_towers'; leave it out"),
        ("deepfm", DEEP | {"combine": "two_towers", "combine_hidden": 4}, "combine_hidden=4 must be a list of layer"),
        ("pnn", DEEP | {"product": "iner"}, "model option product: 'iner'; did you mean 'inner'"),
        ("autoint", {"heads": 0}, "heads=0 must be a whole number of at least 1"),
        ("autoint", {"residual": 1}, "residual=1 must be true or false"),
        ("autoint", {"hidden": 5}, "hidden=5 must be a list of layer widths"),
        ("autoint", {"linear": "tabel"}, "model option linear: 'tabel'; did you mean 'table'"),
        ("dlrm", DEEP | {"bottom": [0]}, r"bottom\[0\]=0 must be a whole number of at least 1"),
        ("dlrm", DEEP | {"bottom": 4}, "bottom=4 must be a list of layer widths"),
        ("shared_bottom", DEEP | {"tower": 3}, "tower=3 must be a list of layer widths"),
        ("mmoe", DEEP | {"experts": 0}, "experts=0 must be a whole number of at least 1"),
        ("mmoe", DEEP | {"gate": [0]}, r"gate\[0\]=0 must be a whole number of at least 1"),
        ("ple", DEEP | {"levels": 0}, "levels=0 must be a whole number of at least 1"),
        ("ple", DEEP | {"shared_experts": 0}, "shared_experts=0 must be a whole number of at least 1"),
        ("xdeepfm", DEEP, "model kind 'xdeepfm' needs the option cin"),
        ("xdeepfm", DEEP | {"cin": []}, r"cin=\[\] leaves no layer; give feature maps per layer, such as"),
        ("xdeepfm", DEEP | {"cin": [4, 0]}, r"cin\[1\]=0 must be a whole number of at least 1"),
        ("xdeepfm", DEEP | {"cin": [5, 3], "split_half": True}, "with split_half all but the last must be even, not 5"),
        ("finalmlp", STREAMS | {"heads": 3}, "heads=3 must divide the last width of hidden1, which is 4"),
        ("finalmlp", STREAMS | {"hidden2": []}, r"hidden2=\[\] leaves no stream; give widths such as"),
        ("finalmlp", STREAMS | {"dropout2": 1}, "dropout2=1 must be a number from 0 up to"),
        ("finalmlp", STREAMS | {"activation1": "rellu"}, "model option activation1: 'rellu'; did you mean 'relu'"),
        ("finalmlp", STREAMS | {"gate1": ["usr"]}, r"model option gate1\[0\]: 'usr'; did you mean 'user'"),
        ("finalmlp", STREAMS | {"gate1": "user"}, "gate1='user' must be a list of names, each once"),
        ("finalmlp", STREAMS | {"gate_tables": ["c"]}, r"model option gate_tables\[0\]: 'c'; There are: a, b$"),
        (
            "finalmlp",
            STREAMS | {"gate_tables": ["b"]},
            "no gate looks at feature 'user' of table 'b'; name it in gate1",
        ),
        ("finalmlp", STREAMS | {"gates": False, "gate1": ["user"]}, "gate1, .*, gate_hidden are of gates; leave"),
        ("finalmlp", STREAMS | {"gates": False, "gate_hidden": [9]}, "gate1, .*, gate_hidden are of gates; leave"),
        ("autoint", {"activation": "dice"}, "activation, batch_norm are of hidden layers; leave them out or give"),
        ("autoint", {"batch_norm": True}, "activation, batch_norm are of hidden layers; leave them out or give"),
    ],
)
def test_a_wrong_kind_or_option_is_named_with_what_is_right(kind, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        make(kind, options)
    assert "\n" not in str(caught.value)


def test_a_deep_model_without_inputs_is_an_error():
    with pytest.raises(ValueError, match="the model has no inputs: there are neither dense features nor embedded"):
        models.build("dnn", num_dense=0, num_fields=0, dim=3, hidden=[3])


def test_one_field_alone_has_no_pair_for_dlrm():
    with pytest.raises(ValueError, match="'dlrm' multiplies pairs, and there is one field alone and no dense feature"):
        models.build("dlrm", num_dense=0, num_fields=1, dim=3, hidden=[3])


def test_sizes_are_not_options():
    with pytest.raises(ValueError, match="unknown option for model kind 'fm': 'dim'; There are: linear"):
        models.check_options("fm", {"dim": 8})


def test_the_source_of_first_order_weights_is_the_option_or_its_default():
    assert models.linear_source("deepfm", DEEP) == "table"
    assert models.linear_source("deepfm", DEEP | {"linear": "projection"}) == "projection"
    assert models.linear_source("dcn", DEEP) == "none"
    with pytest.raises(ValueError, match="unknown model kind 'dpn'"):
        models.linear_source("dpn", {})
    with pytest.raises(ValueError, match="did you mean 'projection'"):
        models.linear_source("deepfm", {"linear": "projected"})


def test_labels_and_sequences_that_a_model_does_not_read_are_refused_by_name():
    sizes = {"num_dense": 0, "num_fields": 4, "dim": 3}
    with pytest.raises(ValueError, match="model kind 'fm' predicts one label, and there are 2: click, buy"):
        models.build("fm", tasks=("click", "buy"), **sizes)
    with pytest.raises(ValueError, match="model kind 'fm' reads no sequences, and there are: 'viewed'"):
        models.build("fm", sequences=[models.Field("item", "viewed")], **sizes)
