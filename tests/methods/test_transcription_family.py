"""The plain-torch transcription of SimCLR, BYOL, SimSiam, Barlow Twins and VICReg meets the golden numbers."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.methods import transcription_family as t
from tests.support.golden import part, read
from tests.test_layers import imports_of

CLOSE = {"rtol": 1e-12, "atol": 1e-13}
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}  # recorded by TensorFlow in float32


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def golden_of(name):
    tensors, meta = read(name)
    return {key: x.double() if x.is_floating_point() else x for key, x in tensors.items()}, meta


def assert_equal(actual, expected, bounds=CLOSE):
    """Assert that all tensors of `expected` are in `actual`."""
    assert expected
    for name, x in expected.items():
        torch.testing.assert_close(actual[name].detach(), x, **bounds, msg=lambda m, name=name: f"{name}: {m}")


def gradients_of(loss_of, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    loss = loss_of(*inputs)
    return loss.detach(), torch.autograd.grad(loss, inputs)


def test_it_uses_nothing_of_fastssl():
    assert {name.split(".")[0] for name in imports_of(Path(t.__file__))} == {"collections", "math", "torch", "typing"}


# Losses


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_ntxent(tau):
    golden, _ = golden_of("simclr_ntxent")
    case = part(golden, f"T{tau}.")
    loss, (gradient,) = gradients_of(lambda x: t.ntxent(*x.chunk(2), tau), golden["input.hidden"])
    assert_equal({"loss": loss, "grad": gradient}, {"loss": case["loss"], "grad": case["grad.hidden"]})
    assert_equal({"loss": loss / 2}, {"loss": case["lightly.loss"]})


def test_ntxent_of_two_ranks_is_that_of_the_whole_batch():
    golden, meta = golden_of("simclr_ntxent")
    case = part(golden, "two_ranks.")

    def rows(x):
        views = x.unflatten(1, (2, -1)).transpose(0, 1).flatten(1, 2)  # [view, image, D]
        return t.ntxent_rows(*views, meta["temperature_two_ranks"])

    loss, (gradient,) = gradients_of(lambda x: rows(x).mean(), case["input.hidden"])
    ranks = rows(case["input.hidden"]).view(2, -1).mean(1)
    assert_equal({"0": ranks[0], "1": ranks[1]}, {"0": case["rank0.loss"], "1": case["rank1.loss"]})
    assert_equal({"loss": loss, "grad": gradient}, {"loss": ranks.mean(), "grad": case["grad_of_mean_loss"]})


def test_byol_regression():
    case = part(golden_of("byol")[0], "regression.")
    rows = case["input.prediction"], case["input.target"]
    other = torch.ones_like(rows[0])  # the second direction, with a distance of zero
    loss, (gradient,) = gradients_of(lambda x: t.byol(x, other, other, rows[1]), rows[0])
    assert_equal({"loss": loss, "grad": gradient}, {"loss": case["loss"], "grad": case["grad.prediction"]})


@pytest.mark.parametrize("size", ["n12_d6", "n6_d16"])
def test_barlow(size):
    golden, meta = golden_of("barlow_twins")
    case = part(golden, f"{size}.")
    dim = case["c"].shape[0]
    p = {"bn.running_mean": torch.zeros(dim).double(), "bn.running_var": torch.ones(dim).double()}
    c = t.correlation(case["input.z1"], case["input.z2"], p=p)
    assert_equal({"c": c} | p, {"c": case["c"]} | {name: case[name] for name in p})
    loss, gradients = gradients_of(
        lambda a, b: t.barlow(t.correlation(a, b), meta["lambd"]), case["input.z1"], case["input.z2"]
    )
    found = {"loss": loss, "grad.z1": gradients[0], "grad.z2": gradients[1]}
    assert_equal(found, {name: case[name] for name in found})


@pytest.mark.parametrize("size", ["n12_d6", "n6_d16"])
@pytest.mark.parametrize("term", ["", "sim.", "std.", "cov."])
def test_vicreg(size, term):
    golden, meta = golden_of("vicreg")
    case = part(golden, f"{size}.")
    coefficients = tuple(meta["coeff"][name] for name in ("sim", "std", "cov"))

    def loss_of(x, y):
        terms = dict(zip(("sim.", "std.", "cov."), t.vicreg_terms(x, y)))
        return terms[term] if term else t.vicreg(x, y, coefficients)

    loss, gradients = gradients_of(loss_of, case["input.x"], case["input.y"])
    expected = [case[term.rstrip(".") or "loss"], case[f"{term}grad.x"], case[f"{term}grad.y"]]
    assert_equal(dict(enumerate((loss, *gradients))), dict(enumerate(expected)))


def test_two_ranks_of_barlow_and_vicreg():
    """Barlow's gradient is divided by the number of ranks; VICReg's invariance is that of a rank's own rows."""
    for name, loss_of, ratio in (
        ("barlow_twins", lambda x, y: t.barlow(t.correlation(x, y)), 1 / 2),
        ("vicreg", t.vicreg, 1),
    ):
        golden, _ = golden_of(name)
        x, y, weight = (golden[f"two_ranks.{key}"] for key in ("input.x", "input.y", "state.projector.weight"))
        loss, (gradient,) = gradients_of(lambda w, x=x, y=y, f=loss_of: f(x @ w.T, y @ w.T), weight)
        one = {"loss": golden["one_rank.loss"], "grad": golden["one_rank.grad.projector.weight"]}
        assert_equal({"loss": loss, "grad": gradient}, one)
        bounds = {"rtol": 1e-10, "atol": 1e-13}
        assert_equal({"grad": gradient * ratio}, {"grad": golden["two_ranks.grad.projector.weight"]}, bounds)
        ranks = loss.repeat(2)
        if name == "vicreg":
            invariance = ((x - y) @ weight.T).square().view(2, -1).mean(1)
            ranks = loss + 25 * (invariance - invariance.mean())
        assert_equal({"losses": ranks}, {"losses": golden["two_ranks.loss"]})


# Head, optimizers, schedules


def test_simclr_head():
    golden, _ = golden_of("simclr_head")
    p = part(golden, "state.")
    names = [(f"{i}.linear", f"{i}.bn") for i in range(3)]
    t.check_head(p, names, t.simclr_layers(3))
    middle = t.head(p, names[:1], golden["input.x"]).relu()
    for i, dim in enumerate((8, 8, 6)):
        p[f"{i}.bn.running_mean"], p[f"{i}.bn.running_var"] = torch.zeros(dim).double(), torch.ones(dim).double()
    out = t.head(p, names, golden["input.x"], "tensorflow")
    assert_equal({"m": middle, "o": out}, {"m": golden["output.middle_layer_train"], "o": golden["output.train"]})
    assert_equal({"o": out}, {"o": golden["tensorflow.output.train"]}, FLOAT32)
    assert_equal(p, part(golden, "after."), FLOAT32)


LARS = {
    "simclr": (t.lars_b, 0.01, {"b"}),
    **{name: (t.lars_a, 0.01, {"b"}) for name in ("byol", "barlow", "vicreg", "dino", "mocov3")},
    "swav_larc": (t.lars_c, 0.01, ()),
    "simsiam_larc_linear": (t.lars_c, 0.0, ()),
    "lightly": (t.lars_c, 0.01, {"b"}),
}


def lars_steps(rule, weight_decay, excluded, count):
    """The tensors after `count` steps, whose gradients are the recorded ones."""
    golden, meta = golden_of("lars_variants")
    p = {name: golden[f"input.{name}0"].clone() for name in "wbz"}
    batches = [[golden[f"input.g{name}{i}"] for name in "wbz"] for i in range(count)]
    options = t.Optimizer(rule, lambda step, name: meta["lr"][step], weight_decay, excluded)
    return t.train(p, batches, lambda p, g: sum((p[n] * x).sum() for n, x in zip("wbz", g)), options).tensors


@pytest.mark.parametrize("variant", LARS)
def test_lars(variant):
    golden, _ = golden_of("lars_variants")
    for step in range(1, 5):
        expected = {name: golden[f"{variant}.{name}{step}"] for name in "wbz"}
        assert_equal(lars_steps(*LARS[variant], step), expected)


@pytest.mark.parametrize("variant", ["simclr", "barlow", "swav_larc", "lightly"])
def test_other_rules_fail(variant):
    """The recorded steps tell the three families apart."""
    rule, weight_decay, excluded = LARS[variant]
    golden, _ = golden_of("lars_variants")
    expected = {name: golden[f"{variant}.{name}4"] for name in "wbz"}
    for wrong in {t.lars_a, t.lars_b, t.lars_c, t.sgd} - {rule}:
        with pytest.raises(AssertionError):
            assert_equal(lars_steps(wrong, weight_decay, excluded, 4), expected)


SCHEDULES = {
    "simclr.lr": partial(t.simclr_lr, base=0.075, batch=64, images=1000, epochs=20, warmup_epochs=5, scaling="sqrt"),
    "byol.lr": partial(t.byol_lr, base=0.2, batch=4096, warmup=10, total=100),
    "byol.tau": partial(t.byol_tau, base=0.996, total=100),
    "simsiam.lr": partial(t.simsiam_lr, base=0.05, batch=512, epochs=100, steps_per_epoch=1),
    "barlow.lr": partial(t.barlow_lr, batch=2048, epochs=20, steps_per_epoch=7),
    "vicreg.lr": partial(t.vicreg_lr, base=0.2, batch=2048, epochs=20, steps_per_epoch=7),
}
ROUNDED = {"rtol": 3e-7, "atol": 1e-7}  # TensorFlow and JAX computed these in float32


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule(name):
    expected = read("schedules_family")[0][name].double()
    found = torch.tensor([SCHEDULES[name](step) for step in range(len(expected))], dtype=torch.float64)
    rounded = torch.equal(expected, expected.float().double())
    assert rounded == (name in ("simclr.lr", "byol.lr"))
    assert_equal({name: found}, {name: expected}, ROUNDED if rounded else CLOSE)


# Whole runs


def byol_run(steps, tensors=None, rule=t.lars_a, **changes):
    """The recorded run, of which arguments change something."""
    golden, meta = golden_of("byol")
    config = meta["config"]
    p = dict(tensors or part(golden, "state."))
    for name in [name for name in p if name.endswith(".1.weight")]:
        norm, dim = name.removesuffix(".weight"), len(p[name])
        p[f"{norm}.running_mean"], p[f"{norm}.running_var"] = torch.zeros(dim).double(), torch.ones(dim).double()
        p[f"{norm}.num_batches_tracked"] = torch.tensor(0)
    rates = [golden[f"step{i}.learning_rate"].item() for i in range(steps)]
    decay = config["optimizer_config"]["weight_decay"]
    arguments = {
        "backbone": lambda p, x: t.linear(p, "encoder.body", x).relu(),
        "projector": [("projector.0", "projector.1"), ("projector.3", None)],
        "predictor": [("predictor.0", "predictor.1"), ("predictor.3", None)],
        "tau": partial(t.byol_tau, base=config["base_target_ema"], total=config["max_steps"]),
        "optimizer": t.Optimizer(rule, lambda step, name: rates[step], decay, t.vectors(p)),
        "classifier": "classifier",
        "running": "haiku",
    }
    batches = [[golden[f"step{i}.input.{key}"] for key in ("view1", "view2", "labels")] for i in range(steps)]
    return t.run_byol(p, batches, **arguments | changes)


def assert_byol(run):
    golden, _ = golden_of("byol")
    step = len(run.losses) - 1
    case = part(golden, f"step{step}.")
    assert_equal({"loss": run.losses[-1]}, {"loss": case["repr_loss"] + case["classif_loss"]})
    for name in ("online.", "target."):
        assert_equal(part(run.tensors, name), part(case, name))
    if step in (0, 3):
        assert set(run.gradients[-1]) == set(part(case, "grad."))
        assert_equal(run.gradients[-1], part(case, "grad."))


def test_byol_steps():
    golden, meta = golden_of("byol")
    for steps in range(1, 5):
        assert_byol(byol_run(steps))
        config = meta["config"] | meta["config"]["lr_schedule_config"]
        lr = t.byol_lr(steps - 1, config["base_learning_rate"], config["batch_size"], 2, config["max_steps"])
        assert lr == pytest.approx(golden[f"step{steps - 1}.learning_rate"].item(), rel=1e-6)
        tau = t.byol_tau(steps - 1, config["base_target_ema"], config["max_steps"])
        assert tau == pytest.approx(golden[f"step{steps - 1}.tau"].item(), rel=1e-12)


def test_byol_under_other_names_without_what_is_not_needed():
    """An online network without prefix; no classifier, and no predictor behind the target: the same networks."""
    golden, _ = golden_of("byol")
    p = part(golden, "state.online.") | {f"ema.{name}": x for name, x in part(golden, "state.target.").items()}
    p = {name: x for name, x in p.items() if not name.startswith(("classifier", "ema.classifier", "ema.predictor"))}
    run = byol_run(4, p, online="", target="ema.", classifier=None)
    assert_equal({"loss": run.losses[3]}, {"loss": golden["step3.repr_loss"]})
    expected = part(golden, "step3.online.") | {f"ema.{n}": x for n, x in part(golden, "step3.target.").items()}
    assert_equal(run.tensors, {name: expected[name] for name in p})
    with pytest.raises(RuntimeError, match="not have been used"):
        byol_run(1, classifier=None)  # the classifier is there, and would have to be in `fixed`


WRONG_BYOL = {
    "lars b": {"rule": t.lars_b},
    "lars c": {"rule": t.lars_c},
    "unbiased running variance": {"running": "torch"},
    "running statistics with their initial values": {"running": "tensorflow"},
    "constant tau": {"tau": lambda step: 0.9},
    "tau of the next step": {"tau": lambda step: t.byol_tau(step + 1, 0.9, 20)},
}


@pytest.mark.parametrize("wrong", WRONG_BYOL)
def test_a_wrong_byol_fails(wrong):
    with pytest.raises(AssertionError):
        assert_byol(byol_run(4, **WRONG_BYOL[wrong]))


def simsiam_run(steps, **wrong):
    golden, meta = golden_of("simsiam")
    p, options = part(golden, "state."), meta["sgd"]
    rate = partial(t.simsiam_lr, base=options["init_lr"], batch=256, epochs=4, steps_per_epoch=1)
    arguments = {
        "backbone": lambda p, x: t.linear(p, "encoder.body", x).relu(),
        "projector": [(f"encoder.fc.{i}", f"encoder.fc.{i + 1}") for i in (0, 3, 6)],
        "predictor": [("predictor.0", "predictor.1"), ("predictor.3", None)],
        "optimizer": t.Optimizer(t.sgd, t.choose(rate, [n for n in p if n.startswith("predictor")]), 1e-4),
    }
    batches = [[golden[f"step{i}.input.x{v}"] for v in (1, 2)] for i in range(steps)]
    assert golden[f"step{steps - 1}.lr"].tolist() == pytest.approx(rate(steps - 1), rel=1e-14)
    return t.run_simsiam(p, batches, **arguments | wrong)


def test_simsiam_steps():
    golden, _ = golden_of("simsiam")
    for steps in (1, 2, 3):
        run = simsiam_run(steps)
        assert_equal({"loss": run.losses[-1]}, {"loss": golden[f"step{steps - 1}.loss"]})
    assert_equal(run.gradients[0], part(golden, "step0.grad."))
    assert set(run.gradients[0]) == set(part(golden, "step0.grad."))
    assert_equal(run.tensors, part(golden, "step2.state."))
    assert torch.equal(run.tensors["encoder.fc.6.bias"], golden["state.encoder.fc.6.bias"])


@pytest.mark.parametrize("excluded", [(), ("predictor.1.weight",)])
def test_a_wrong_simsiam_fails(excluded):
    golden, _ = golden_of("simsiam")
    fixed_lr = bool(excluded)  # else the predictor's follows the cosine too

    def lr(step, name):
        return golden[f"step{step}.lr"][int(fixed_lr and name.startswith("predictor"))].item()

    run = simsiam_run(3, optimizer=t.Optimizer(t.sgd, lr, 1e-4, excluded))
    with pytest.raises(AssertionError):
        assert_equal(run.tensors, part(golden, "step2.state."))


# Runs without a recorded one: their forward pass against torch.nn, their parts against the golden numbers above


def modules(method):
    """backbone Linear + ReLU, and the head of the method, of torch.nn."""
    bias, layers = method == "vicreg", 2 if method == "simclr_v1" else 3
    parts = []
    for i in range(layers):
        last = i == layers - 1
        parts += [nn.Linear(8, 6 if last else 8, bias=bias and not last)]
        parts += [nn.BatchNorm1d(8), nn.ReLU()] if not last else []
    if method.startswith("simclr"):
        parts += [nn.BatchNorm1d(6)]
        parts[-1].bias.requires_grad_(False)
    model = nn.ModuleDict({"body": nn.Linear(5, 8), "projector": nn.Sequential(*parts)})
    if method == "barlow":
        model["bn"] = nn.BatchNorm1d(6, affine=False)
    return model.double()


def loss_by_modules(method, model, x, y):
    def embed(images):
        return model["projector"](model["body"](images).relu())

    if method.startswith("simclr"):
        z = F.normalize(embed(torch.cat([x, y])), dim=1)
        logits = (z @ z.T / 0.2).fill_diagonal_(-1e9)
        return 2 * F.cross_entropy(logits, torch.arange(len(z)).roll(len(x)))
    zx, zy = embed(x), embed(y)
    if method == "barlow":
        c = model["bn"](zx).T @ model["bn"](zy) / 10
        weight = torch.full_like(c, 0.0051).fill_diagonal_(1)
        return (weight * (c - torch.eye(6)).square()).sum()
    std = sum(F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() / 2 for z in (zx, zy))
    cov = sum((torch.cov(z.T) * (len(z) - 1) / 9 * (1 - torch.eye(6))).square().sum() / 6 for z in (zx, zy))
    return 25 * F.mse_loss(zx, zy) + 25 * std + cov


@pytest.mark.parametrize("method", ["simclr_v1", "simclr_v2", "barlow", "vicreg"])
def test_runs_agree_with_modules(method):
    torch.manual_seed(0)
    model = modules(method)
    initial = {name: x.clone() for name, x in model.state_dict().items()}
    batches = [torch.randn(2, n, 5).double() for n in (10, 10, 8)]  # the last batch is smaller
    linears = [i for i, m in enumerate(model["projector"]) if isinstance(m, nn.Linear)]
    norms = [i for i, m in enumerate(model["projector"]) if isinstance(m, nn.BatchNorm1d)]
    names = [(f"projector.{i}", f"projector.{i + 1}" if i + 1 in norms else None) for i in linears]
    options = t.Optimizer(t.sgd, lambda step, name: 0.01 * (step + 1), 0.01)
    arguments = {"backbone": lambda p, x: t.linear(p, "body", x).relu(), "projector": names, "optimizer": options}
    if method.startswith("simclr"):
        offset = f"projector.{norms[-1]}.bias"
        run = t.run_simclr(initial, batches, tau=0.2, fixed={offset}, **arguments)
    else:
        run = {"barlow": t.run_barlow, "vicreg": t.run_vicreg}[method](initial, batches, batch_size=10, **arguments)
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), 0.0, momentum=0.9, weight_decay=0.01)
    for step, (x, y) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 0.01 * (step + 1)
        optimizer.zero_grad()
        loss = loss_by_modules(method, model, x, y)
        loss.backward()
        assert_equal({"loss": run.losses[step]}, {"loss": loss.detach()})
        assert_equal(run.gradients[step], {name: x.grad for name, x in trained.items()}, {"rtol": 1e-9, "atol": 1e-12})
        optimizer.step()
    assert_equal(run.tensors, model.state_dict(), {"rtol": 1e-9, "atol": 1e-12})
    assert all((run.tensors[name] != initial[name]).any() for name in trained)


def one_step(method, **changes):
    """Loss and gradients of a run's first step."""
    torch.manual_seed(0)
    state, batches = modules(method).state_dict(), [torch.randn(2, 10, 5).double()]
    run = {"simclr_v2": t.run_simclr, "barlow": t.run_barlow, "vicreg": t.run_vicreg}[method]
    last = "projector.7" if method == "simclr_v2" else None
    projector = [("projector.0", "projector.1"), ("projector.3", "projector.4"), ("projector.6", last)]
    options = t.Optimizer(t.sgd, lambda step, name: 0.0)
    found = run(
        state,
        batches,
        backbone=lambda p, x: t.linear(p, "body", x).relu(),
        projector=projector,
        optimizer=options,
        **changes,
    )
    return found.losses[0], found.gradients[0]


def test_simclr_takes_the_paper_s_loss_and_views_apart():
    step = partial(one_step, "simclr_v2", tau=0.2, fixed={"projector.7.bias"})
    loss = step()[0]
    assert_equal({"half": step(loss_scale=0.5)[0] * 2}, {"half": loss})
    assert (step(joint=False)[0] - loss).abs() > 1e-6


def test_ranks_divide_the_gradient_of_barlow():
    (loss, gradients), (other_loss, quarters) = one_step("barlow"), one_step("barlow", ranks=4)
    assert torch.equal(loss, other_loss)
    assert_equal({name: 4 * x for name, x in quarters.items()}, gradients)


def test_coefficients_of_vicreg():
    loss, more, std = (one_step("vicreg", coefficients=c)[0] for c in ((25, 25, 1), (25, 50, 1), (0, 25, 0)))
    assert std > 0
    assert_equal({"std": more - loss}, {"std": std}, {"rtol": 1e-10, "atol": 0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update({"a.bias": torch.zeros(3)}), "a must have no bias"),
        (lambda p: p.pop("n.bias"), "n must have a bias"),
        (lambda p: p.update({"m.bias": torch.ones(3)}), "m must have no bias"),
        (lambda p: p.pop("m.weight"), "m must have a weight"),
    ],
)
def test_another_head_is_refused(change, message):
    p = {name: torch.zeros(3, 3) for name in ("a.weight", "b.weight")} | {
        name: torch.zeros(3) for name in ("n.weight", "n.bias", "m.weight", "m.bias")
    }
    names = [("a", "n"), ("b", "m")]
    t.check_head(p, names, t.simclr_layers(2), fixed={"m.bias"})
    with pytest.raises(ValueError, match="m must have no bias"):
        t.check_head(p, names, t.simclr_layers(2))
    with pytest.raises(ValueError, match="3 layers, but 2"):
        t.check_head(p, names, t.simclr_layers(3))
    with pytest.raises(ValueError, match="comes a batch norm, but None"):
        t.check_head(p, [("a", "n"), ("b", None)], t.simclr_layers(2))
    change(p)
    with pytest.raises(ValueError, match=message):
        t.check_head(p, names, t.simclr_layers(2), fixed={"m.bias"})
