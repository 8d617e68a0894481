import pytest
import torch
import torch.nn.functional as F

from fastssl import nn
from fastssl.distributed import rank, world_size
from fastssl.nn import DINOHead, DINOLoss, FactoredLogits, IBOTPatchLoss, cross_entropy
from fastssl.nn.prototype_losses import centred_targets, mean_logits, patch_weights, teacher_entropy, view_cross_entropy
from tests.support.golden import part, read
from tests.support.ranks import run_ranks

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def golden(name):
    tensors, meta = read(name)
    return {key: x.double() if x.is_floating_point() else x for key, x in tensors.items()}, meta


def factored(logits):
    """The logits as products with unit prototypes, so that their gradient is that of the features."""
    return FactoredLogits(logits, torch.eye(logits.shape[1], dtype=logits.dtype))


@pytest.mark.parametrize("form", ["factored", "views"])
def test_golden_steps_of_dino(form):
    """Losses, gradients, centre and temperature of three steps of the official code."""
    tensors, meta = golden("dino_loss_head")
    settings = meta["loss"]
    names = ("warmup_teacher_temp", "teacher_temp", "warmup_teacher_temp_epochs", "student_temp", "center_momentum")
    criterion = DINOLoss(settings["out_dim"], **{name: settings[name] for name in names}).double()
    temperatures = [criterion.teacher_temp_at(epoch) for epoch in range(settings["epochs"])]
    assert temperatures == pytest.approx(tensors["loss.teacher_temp_schedule"].tolist(), rel=1e-12)
    for step in range(3):
        case = part(tensors, f"loss.step{step}.")
        student, teacher = case["input.student"].requires_grad_(), case["input.teacher"]
        if form == "factored":
            loss = criterion(factored(teacher), factored(student), epoch=step)
        else:
            loss = criterion(teacher.chunk(2), student.chunk(6), epoch=step)
        (gradient,) = torch.autograd.grad(loss, student)
        torch.testing.assert_close(loss.detach(), case["loss"], **EXACT)
        torch.testing.assert_close(gradient, case["grad.student"], **EXACT)
        torch.testing.assert_close(criterion.center, case["center_after"], **EXACT)


@pytest.mark.parametrize("form", ["factored", "rows"])
def test_golden_patches_of_dinov2(form):
    """Losses and gradients of masked patches, with padding, and the centre, which DINOv2 applies a step later."""
    tensors, meta = golden("dinov2_losses")
    criterion = IBOTPatchLoss(9, meta["patch"]["teacher_temp"], meta["patch"]["student_temp"]).double()
    for step in range(3):
        case = part(tensors, f"patch.step{step}.")
        torch.testing.assert_close(criterion.center.flatten(), case["center_used"].flatten(), **EXACT)
        teacher, student = case["input.teacher"], case["input.student"].requires_grad_()
        masked, images = student[: len(teacher)], len(case["mask"])
        torch.testing.assert_close(patch_weights(case["mask"], torch.float64), case["masks_weight"], rtol=1e-7, atol=0)
        form_of = factored if form == "factored" else lambda x: x
        loss = criterion.cross_entropy(form_of(teacher), form_of(masked), case["masks_weight"]) / images
        loss.backward()
        torch.testing.assert_close(loss.detach(), case["centering.loss"], **EXACT)
        torch.testing.assert_close(student.grad, case["centering.grad.student"], **EXACT)
        criterion.update_center(mean_logits(form_of(teacher)))
    torch.testing.assert_close(criterion.center.flatten(), tensors["patch.center_after"].flatten(), **EXACT)


def test_golden_class_tokens_of_dinov2():
    """All pairs of six views of the student and two of the teacher, none of which is the same."""
    tensors, meta = golden("dinov2_losses")
    criterion = DINOLoss(9, student_temp=0.1).double()
    rows = torch.arange(8).view(2, 4).T.repeat(6, 1)
    for step in range(3):
        case = part(tensors, f"cls.step{step}.")
        torch.testing.assert_close(criterion.center, case["center_used"], **EXACT)
        targets = centred_targets(factored(case["input.teacher"]), meta["cls"]["teacher_temp"], criterion.center)
        probabilities = (targets.teacher / targets.tau + targets.row_offset[:, None] + targets.column_offset).exp()
        torch.testing.assert_close(probabilities, case["probabilities"], **EXACT)
        student = case["input.student"].requires_grad_()
        from fastssl.ops.prototypes import soft_cross_entropy

        loss = soft_cross_entropy(*factored(student.flatten(0, 1)), 0.1, targets, rows).sum() / 4
        loss.backward()
        torch.testing.assert_close(loss.detach(), case["loss"], **EXACT)
        torch.testing.assert_close(student.grad, case["grad.student"], **EXACT)
        criterion.update_center(case["input.teacher"])
    torch.testing.assert_close(criterion.center, tensors["cls.center_after"], **EXACT)


@pytest.mark.parametrize("form", ["factored", "rows"])
def test_golden_steps_of_ibot(form):
    """Both losses of iBOT: class tokens as DINO's, patches with the centre of all patches, masked or not."""
    tensors, meta = golden("ibot")
    settings = meta["loss"]
    form_of = factored if form == "factored" else lambda x: x
    views = factored if form == "factored" else lambda x: x.split(settings["batch"])
    cls = DINOLoss(settings["out_dim"], 0.04, 0.07, 2).double()
    patch = IBOTPatchLoss(settings["patch_out_dim"]).double()
    for step in range(3):
        case = part(tensors, f"loss.step{step}.")
        mask = torch.cat([case["input.mask0"], case["input.mask1"]]).flatten(1)
        names = ("student_cls", "student_local_cls", "student_patch")
        inputs = [case[f"input.{name}"].requires_grad_() for name in names]
        teacher = case["input.teacher_patch"]
        cls_loss = cls(views(case["input.teacher_cls"]), views(torch.cat(inputs[:2])), epoch=step)
        temp = [0.04, 0.06, 0.06][step]
        rows = form_of(teacher[mask]), form_of(inputs[2][mask])
        patch_loss = patch.cross_entropy(*rows, patch_weights(mask, torch.float64), temp) / len(mask)
        patch.update_center(teacher)
        torch.testing.assert_close(cls_loss.detach(), case["cls"], **EXACT)
        torch.testing.assert_close(patch_loss.detach(), case["patch"], **EXACT)
        (cls_loss + patch_loss).backward()
        for name, x in zip(names, inputs):
            if f"grad.{name}" in case:
                torch.testing.assert_close(x.grad, case[f"grad.{name}"], **EXACT)
        torch.testing.assert_close(cls.center, case["center_after"], **EXACT)
        torch.testing.assert_close(patch.center.flatten(), case["center2_after"].flatten(), **EXACT)


def test_lightlys_losses():
    """The same calls give lightly's losses, gradients and centres, three times in a row."""
    loss = pytest.importorskip("lightly.loss")
    arguments = (12, 0.04, 0.07, 3, 0.1, 0.8)
    pair = DINOLoss(*arguments), loss.DINOLoss(*arguments)
    patch_pair = IBOTPatchLoss(12), loss.IBOTPatchLoss(12)
    mask = torch.rand(4, 3, 3) < 0.4
    mask[0] = False
    count = int(mask.sum())
    for epoch in range(4):
        teacher = [torch.randn(5, 12) for _ in range(2)]
        student = [torch.randn(5, 12, requires_grad=True) for _ in range(4)]
        ours, theirs = (criterion(teacher, student, epoch=epoch) for criterion in pair)
        torch.testing.assert_close(ours, theirs)
        gradients = [torch.autograd.grad(x, student) for x in (ours, theirs)]
        torch.testing.assert_close(*gradients)
        torch.testing.assert_close(pair[0].center.flatten(), pair[1].center.flatten())
        teacher_rows, rows = torch.randn(count, 12), torch.randn(count, 12, requires_grad=True)
        ours, theirs = (criterion(teacher_rows, rows, mask) for criterion in patch_pair)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(x, rows) for x in (ours, theirs)))
        torch.testing.assert_close(patch_pair[0].center.flatten(), patch_pair[1].center.value.flatten())


def test_lightlys_arguments_and_state_dicts():
    """In lightly's order, and centres of its shapes and names."""
    loss = pytest.importorskip("lightly.loss")
    for ours, theirs in (
        [module.DINOLoss(12, 0.04, 0.07, 3, 0.2, 0.8, "mean") for module in (nn, loss)],
        [module.IBOTPatchLoss(12, 0.05, 0.2, "mean", 0.8) for module in (nn, loss)],
    ):
        for name in ("teacher_temp", "student_temp"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert ours.center_momentum == 0.8
        state = {name: torch.randn_like(x) for name, x in theirs.state_dict().items()}
        ours.load_state_dict(state)
        assert torch.equal(ours.center.flatten(), next(iter(state.values())).flatten())
        ours.load_state_dict(ours.state_dict())
        with pytest.raises(RuntimeError, match="size mismatch for center"):
            ours.load_state_dict({"center": torch.zeros(1, 13)})
    whole = torch.nn.ModuleDict({"cls": DINOLoss(3), "patch": IBOTPatchLoss(3)})
    whole.load_state_dict({"cls.center": torch.ones(1, 1, 3), "patch.center.center": torch.ones(1, 3)})
    assert whole["patch"].center.sum() == 3


def test_factored_logits_of_a_head_give_the_loss_of_its_logits():
    torch.manual_seed(0)
    head, teacher = (DINOHead(6, 20, norm_last_layer=False, hidden_dim=8, bottleneck_dim=5).double() for _ in range(2))
    x, views = torch.randn(18, 6).double(), torch.randn(6, 6).double()
    criterion = DINOLoss(20, student_temp=0.2).double()
    criterion.center.normal_(std=0.1)
    results = []
    with torch.no_grad():
        outputs = teacher.factored(views), teacher(views).chunk(2)
    for out, form in zip(outputs, (head.factored, lambda x: head(x).chunk(6))):
        loss = criterion.cross_entropy(out, form(x), 0.05)
        results.append((loss.detach(), *torch.autograd.grad(loss, list(head.parameters()))))
        torch.testing.assert_close(mean_logits(out), teacher(views).mean(0).detach())
    torch.testing.assert_close(*results)


def test_one_view_of_the_teacher():
    criterion = DINOLoss(7, teacher_views=1).double()
    teacher, student = torch.randn(3, 7).double(), torch.randn(6, 7).double()
    expected = -((teacher / 0.04).softmax(1) * (student[3:] / 0.1).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(criterion.cross_entropy([teacher], student.chunk(2), 0.04), expected)
    torch.testing.assert_close(criterion.cross_entropy(factored(teacher), factored(student), 0.04), expected)


def test_the_entropy_of_the_teacher():
    logits = torch.randn(70, 9).double()
    centre = torch.randn(1, 9).double()
    p = ((logits - centre) / 0.3).softmax(1)
    targets = centred_targets(factored(logits), 0.3, centre)
    torch.testing.assert_close(teacher_entropy(targets), -(p * p.log()).sum(1).mean())


def test_a_centre_ignores_logits_that_are_not_finite():
    criterion = DINOLoss(3)
    criterion.update_center(torch.tensor([[1.0, 2.0, 3.0]]))
    before = criterion.center.clone()
    torch.testing.assert_close(before, torch.tensor([[0.1, 0.2, 0.3]]))
    criterion.update_center(torch.tensor([[1.0, torch.nan, 3.0]]))
    assert torch.equal(criterion.center, before)


def centre_on_this_rank():
    criterion = DINOLoss(4)
    logits = torch.arange(24.0).view(6, 4).sin()
    criterion.update_center(logits.chunk(world_size())[rank()])
    return criterion.center


@pytest.mark.slow
def test_two_ranks_have_the_centre_of_all_rows():
    one = centre_on_this_rank()
    for centre in run_ranks(2, centre_on_this_rank):
        torch.testing.assert_close(centre, one)


# cross_entropy


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shape", [(5, 11), (2, 5, 11), (11,), (0, 11)])
def test_cross_entropy_of_logits(shape, inplace, monkeypatch):
    """DINOv2's call, in one piece and in pieces of two rows."""
    for chunk in (2**22, 22):
        monkeypatch.setattr("fastssl.nn.prototype_losses.CHUNK", chunk)
        leaf = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        student, teacher = leaf * 1, torch.rand(shape, dtype=torch.float64)
        loss = cross_entropy(student, teacher, 0.3, bw_inplace=inplace)
        expected = -(teacher * (leaf / 0.3).log_softmax(-1)).sum(-1)
        torch.testing.assert_close(loss, expected)
        cotangent = torch.randn_like(expected)
        (gradient,) = torch.autograd.grad(expected, leaf, cotangent)
        kept = student.detach().clone()
        torch.testing.assert_close(torch.autograd.grad(loss, leaf, cotangent)[0], gradient)
        assert torch.equal(student.detach(), kept) != (inplace and bool(student.numel()))


def test_cross_entropy_of_16_bits():
    student, teacher = torch.randn(6, 40).bfloat16().requires_grad_(), torch.rand(6, 40).bfloat16()
    loss = cross_entropy(student, teacher, 0.1)
    assert loss.dtype == torch.float32
    expected = -(teacher.double() * (student.double() / 0.1).log_softmax(-1)).sum(-1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    loss.sum().backward()
    assert student.grad.dtype == torch.bfloat16


def test_the_gradient_of_cross_entropy():
    student = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.rand(3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, teacher, 0.7), student)


def test_what_dinov2_computes_with_it():
    """Its patch loss in the form of its repository."""
    student, teacher = torch.randn(5, 11), torch.rand(5, 11)
    lossfunc = -cross_entropy(student.unsqueeze(0), teacher.unsqueeze(0), 0.1, bw_inplace=True).squeeze(0)
    torch.testing.assert_close(lossfunc, torch.sum(teacher * F.log_softmax(student / 0.1, dim=-1), dim=-1))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: DINOLoss(4, teacher_temp=0.0), "DINOLoss: temperatures must be above 0, got 0.0"),
        (lambda: DINOLoss(4, center_momentum=1.1), "DINOLoss: center_momentum must be between 0 and 1, got 1.1"),
        (lambda: IBOTPatchLoss(4, student_temp=-1.0), "IBOTPatchLoss: temperatures must be above 0, got -1.0"),
        (
            lambda: DINOLoss(4)([torch.zeros(2, 4)], [torch.zeros(2, 4)]),
            "DINOLoss: there must be at least two views of the student, of which the teacher's are the first, got 1 of "
            "the student and 1 of the teacher",
        ),
        (
            lambda: DINOLoss(4)(factored(torch.zeros(4, 4)), [torch.zeros(2, 4)] * 2),
            "DINOLoss: teacher_out and student_out must both be FactoredLogits, or both be logits",
        ),
        (
            lambda: DINOLoss(4)(factored(torch.zeros(4, 4)), factored(torch.zeros(5, 4))),
            "view_cross_entropy: student and teacher must have the rows of whole views of B = 4 / 2 images, got 5 and "
            "4 rows",
        ),
        (
            lambda: IBOTPatchLoss(4)(torch.zeros(3, 4), torch.zeros(3, 4), torch.ones(2, 2, dtype=torch.bool)),
            "IBOTPatchLoss: teacher_out must have the 4 rows of mask, got 3",
        ),
        (
            lambda: IBOTPatchLoss(4)(torch.zeros(3, 4), torch.zeros(3, 4), torch.ones(3)),
            "patch_weights: mask must be bool of shape [B, H, W] or [B, L], got [3] of torch.float32",
        ),
        (
            lambda: DINOLoss(4)([torch.zeros(2, 4)] * 2, [torch.zeros(2, 5)] * 3),
            "DINOLoss: student_out[0] must have shape [B=2, K=4], got [2, 5]",
        ),
        (
            lambda: DINOLoss(4)([torch.zeros(2, 4), torch.zeros(3, 4)], [torch.zeros(2, 4)] * 3),
            "DINOLoss: teacher_out[1] must have shape [B=2, K=4], got [3, 4]",
        ),
        (
            lambda: DINOLoss(4)(torch.zeros(2, 4), torch.zeros(3, 4)),
            "DINOLoss: teacher_out[0] must have shape [B, K=4], got [4]",
        ),
        (
            lambda: DINOLoss(5)(factored(torch.zeros(4, 4)), factored(torch.zeros(8, 4))),
            "DINOLoss: FactoredLogits must have output_dim=5 prototypes, got 4",
        ),
        (
            lambda: DINOLoss(4)([torch.zeros(2, 4)] * 2, [torch.zeros(2, 4)] * 3, teacher_temp=-1.0),
            "DINOLoss: temperatures must be above 0, got -1.0",
        ),
        (lambda: DINOLoss(4).teacher_temp_at(-1), "DINOLoss: epoch must be at least 0, got -1"),
        (
            lambda: DINOLoss(4, warmup_teacher_temp_epochs=-1),
            "DINOLoss: warmup_teacher_temp_epochs must be at least 0, got -1",
        ),
        (lambda: DINOLoss(0), "DINOLoss: output_dim must be at least 1, got 0"),
        (lambda: DINOLoss(4, center_mode="sum"), "DINOLoss: center_mode must be 'mean', got 'sum'"),
        (
            lambda: IBOTPatchLoss(4)(torch.zeros(4, 5), torch.zeros(4, 5), torch.ones(2, 2, dtype=torch.bool)),
            "IBOTPatchLoss: teacher_out must have shape [M=4, K=4], got [4, 5]",
        ),
        (
            lambda: IBOTPatchLoss(4)(torch.zeros(4, 4), torch.zeros(3, 4), torch.ones(2, 2, dtype=torch.bool)),
            "IBOTPatchLoss: student_out must have shape [M=4, K=4], got [3, 4]",
        ),
        (
            lambda: cross_entropy(torch.zeros(3, 4), torch.zeros(3, 5)),
            "cross_entropy: student and teacher must have one shape [..., K], got [3, 4] and [3, 5]",
        ),
        (
            lambda: cross_entropy(torch.zeros(3, 0), torch.zeros(3, 0)),
            "cross_entropy: student and teacher must have one shape [..., K], got [3, 0] and [3, 0]",
        ),
        (
            lambda: cross_entropy(torch.zeros(3, 4), torch.zeros(3, 4, requires_grad=True)),
            "cross_entropy: teacher must not require a gradient: pass teacher.detach()",
        ),
    ],
)
def test_bad_input_is_refused(call, sentence):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: DINOLoss(4)(None, []), "DINOLoss: teacher_out must be a list of the logits [B, K] of each view, got "),
        (lambda: DINOLoss(4)([1], [2]), "DINOLoss: teacher_out[0] must be a tensor of shape [B, K], got int"),
        (lambda: DINOLoss(4)([torch.ones(2, 4).long()], []), "DINOLoss: teacher_out[0] must be float32, float64, "),
        (lambda: DINOLoss(4, student_temp="a"), "DINOLoss: temperature must be a number, got 'a'"),
        (lambda: DINOLoss(4.0), "DINOLoss: output_dim must be an integer, got 4.0"),
        (lambda: IBOTPatchLoss(4)([1], [2], torch.ones(1, 1) > 0), "IBOTPatchLoss: teacher_out must be a tensor, got "),
    ],
)
def test_other_types_are_refused(call, sentence):
    with pytest.raises(TypeError) as error:
        call()
    assert str(error.value).startswith(sentence)


def test_a_loss_of_factored_logits_has_no_logits_with_a_gradient():
    """The mean over pairs is that of `ops.soft_cross_entropy`, which keeps neither logits nor targets."""
    student, prototypes = torch.randn(12, 5).double(), torch.randn(30, 5).double()
    teacher = FactoredLogits(torch.randn(4, 5).double(), torch.randn(30, 5).double())
    targets = centred_targets(teacher, 0.1, torch.zeros(30).double())
    loss = view_cross_entropy(FactoredLogits(student, prototypes), targets, 0.2, 2)
    p = (teacher.features @ teacher.prototypes.T / 0.1).softmax(1).chunk(2)
    log_q = (student @ prototypes.T / 0.2).log_softmax(1).chunk(6)
    pairs = [-(p[t] * log_q[v]).sum(1).mean() for t in range(2) for v in range(6) if t != v]
    torch.testing.assert_close(loss, torch.stack(pairs).mean())
