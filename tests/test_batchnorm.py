"""Batch norms that see one value per channel."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from e3va_peft import E3VAConfig
from e3va_peft.training.batchnorm import allow_single_values
from tests.helpers import assert_same
from tests.models import BY_NAME, loss_of

KINDS = {nn.BatchNorm1d: (4,), nn.BatchNorm2d: (4, 1, 1), nn.BatchNorm3d: (4, 1, 1, 1)}

every_upernet = pytest.mark.parametrize("name", ["swin-upernet", "dinov2-upernet"])
every_kind = pytest.mark.parametrize("kind", KINDS)


def adapted(model: nn.Module) -> nn.Module:
    return get_peft_model(model, E3VAConfig(r=4))


WAYS = {
    "plain": allow_single_values,
    "before injection": lambda model: adapted(allow_single_values(model)),
    "after injection": lambda model: allow_single_values(adapted(model)),
}


def used(kind: type[nn.Module], **arguments) -> nn.Module:
    """A layer whose running statistics and affine parameters are not those of a new one."""
    layer = kind(4, **arguments)
    with torch.no_grad():
        for tensor in [*layer.parameters(), *layer.buffers()]:
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return layer


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@every_upernet
@pytest.mark.parametrize("build", [lambda model: model, adapted], ids=["plain", "adapted"])
def test_upernet_does_not_train_on_one_image_by_itself(name, build):
    case = BY_NAME[name]
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        build(case.base()).train()(**case.training_batch(1))


@every_upernet
@pytest.mark.parametrize("way", WAYS)
def test_upernet_trains_on_one_image(name, way):
    case = BY_NAME[name]
    model = WAYS[way](case.base()).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    batch = case.training_batch(1)
    batch["labels"] = batch["labels"].sort().values  # three vertical stripes, which upsampled logits can follow
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_of(model(**batch))
        loss.backward()
        assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in trained)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@every_upernet
def test_the_pooling_branch_gets_a_gradient_from_one_image(name):
    case = BY_NAME[name]
    model = allow_single_values(adapted(case.base())).train()
    loss_of(model(**case.training_batch(1))).backward()
    branch = model.base_model.model.decode_head.modules_to_save["default"].psp_modules.blocks[0]
    assert branch.layers[1].conv.weight.grad.abs().max() > 0


@every_upernet
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", [lambda model: model, adapted], ids=["plain", "adapted"])
def test_two_images_give_the_same_bits_as_before(name, training, build):
    case = BY_NAME[name]
    plain = build(case.base())
    changed = allow_single_values(copy.deepcopy(plain))
    results = []
    for model in (plain, changed):
        model.train(training)
        torch.manual_seed(0)
        loss, logits = model(**case.training_batch(2))[:2]
        loss.backward()
        grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        results.append({"loss": loss, "logits": logits, "grads": grads, "state": state(model)})
    assert list(plain.state_dict()) == list(changed.state_dict())
    assert_same(results[1], results[0], rtol=0, atol=0)


@every_upernet
def test_the_state_dict_goes_back_and_forth(name):
    case = BY_NAME[name]
    plain, changed = case.base(seed=1), allow_single_values(case.base(seed=2))
    identity = [id(tensor) for tensor in [*changed.parameters(), *changed.buffers()]]
    changed.load_state_dict(plain.state_dict())
    assert identity == [id(tensor) for tensor in [*changed.parameters(), *changed.buffers()]]
    plain.load_state_dict(changed.state_dict())


@every_kind
def test_a_single_value_is_normalised_as_in_evaluation(kind):
    layer = allow_single_values(used(kind))
    before, x = state(layer), torch.randn(1, *KINDS[kind], requires_grad=True)
    output = layer(x)
    output.square().sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in layer.parameters())]
    assert all(gradient.abs().min() > 0 for gradient in gradients)
    assert_same(state(layer), before, rtol=0, atol=0)
    assert torch.equal(output, layer.eval()(x))


@every_kind
@pytest.mark.parametrize("momentum", [0.3, None])
def test_several_values_are_normalised_as_by_torch(kind, momentum):
    plain = used(kind, momentum=momentum)
    changed = allow_single_values(copy.deepcopy(plain))
    for x in (torch.randn(3, *KINDS[kind]), torch.randn(2, *KINDS[kind])):
        assert torch.equal(changed(x), plain(x))
    assert changed.num_batches_tracked == plain.num_batches_tracked
    assert_same(state(changed), state(plain), rtol=0, atol=0)


@every_kind
def test_a_layer_without_affine_parameters_works_too(kind):
    layer = allow_single_values(used(kind, affine=False))
    x = torch.randn(1, *KINDS[kind])
    assert torch.equal(layer(x), layer.eval()(x))


@every_kind
def test_without_running_statistics_the_error_stays(kind):
    layer = allow_single_values(kind(4, track_running_stats=False))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        layer(torch.randn(1, *KINDS[kind]))


@every_kind
def test_an_input_of_wrong_dimension_is_still_refused(kind):
    for shape in ((4,), (1, 4, 1, 1, 1, 1)):
        for layer in (kind(4), allow_single_values(kind(4))):
            with pytest.raises(ValueError, match=r"expected .* input"):
                layer(torch.randn(shape))


def test_the_same_objects_are_changed_and_a_second_call_changes_nothing():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Sequential(nn.BatchNorm2d(4)), nn.BatchNorm3d(4), nn.Linear(4, 4))
    aliases, layers = list(model.modules()), [model[0], model[1][0], model[2]]
    assert allow_single_values(model) is model
    classes = [type(module) for module in aliases]
    for layer, kind in zip(layers, KINDS, strict=True):
        assert isinstance(layer, kind) and type(layer) is not kind
    allow_single_values(model)
    assert [type(module) for module in aliases] == classes
    assert list(model.modules()) == aliases


def test_other_batch_norms_are_left_alone():
    class Own(nn.BatchNorm2d):
        pass

    for layer in (nn.SyncBatchNorm(4), Own(4), nn.LazyBatchNorm2d(), nn.InstanceNorm2d(4), nn.GroupNorm(2, 4)):
        kind = type(layer)
        assert type(allow_single_values(layer)) is kind


def test_a_changed_layer_can_become_a_synchronised_one():
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(allow_single_values(used(nn.BatchNorm2d)))
    assert type(layer) is nn.SyncBatchNorm


def saved_and_loaded(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), saved_and_loaded]
)
def test_a_copy_trains_on_one_image_too(duplicate):
    # The head alone: transformers' Swin cannot be pickled, because it hangs local functions on its modules.
    head = allow_single_values(BY_NAME["swin-upernet"].base().decode_head).train()
    maps = [torch.randn(1, channels, 8, 8) for channels in head.in_channels]
    assert torch.equal(duplicate(head)(maps), head(maps))


def test_ddp_sees_no_unused_parameter(tmp_path):
    case = BY_NAME["swin-upernet"]
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        model = DistributedDataParallel(allow_single_values(adapted(case.base())).train())
        for batch_size in (1, 2, 1):  # DDP complains at the next step about parameters that got no gradient in this
            loss_of(model(**case.training_batch(batch_size))).backward()
    finally:
        distributed.destroy_process_group()


def test_it_compiles_in_one_graph():
    model = allow_single_values(nn.Sequential(used(nn.BatchNorm2d), nn.AdaptiveAvgPool2d(1), used(nn.BatchNorm2d)))
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True, dynamic=False)
    for batch_size in (1, 2):
        x = torch.randn(batch_size, 4, 6, 6)
        torch.testing.assert_close(compiled(x), model(x))
    assert_same(state(twin), state(model), rtol=1e-6, atol=1e-7)
