"""Several processes, several threads, replicas, compiled graphs."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from peft import get_peft_model
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from e3va_peft import E3VAConfig
from tests.models import BY_NAME, every_model, loss_of
from tests.test_laws import assert_same, outputs


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    store = distributed.FileStore(str(tmp_path_factory.mktemp("ddp") / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@every_model
def test_ddp_sees_no_unused_parameter(case, process_group):
    model = DistributedDataParallel(get_peft_model(case.base(), E3VAConfig(r=4)).train(), find_unused_parameters=False)
    for _ in range(3):  # DDP complains at the next step about parameters that got no gradient in this one
        loss_of(model(**case.training_batch())).backward()


def test_ddp_would_have_complained(process_group):
    model = get_peft_model(BY_NAME["swin-classifier"].base(), E3VAConfig(r=4)).train()
    model.base_model.model.classifier.modules_to_save["default"].extra = nn.Linear(2, 2)
    model = DistributedDataParallel(model, find_unused_parameters=False)
    with pytest.raises(RuntimeError, match="not used in producing loss"):
        for _ in range(2):
            loss_of(model(**BY_NAME["swin-classifier"].training_batch())).backward()


@pytest.mark.parametrize("name", ["swin-upernet", "vit-classifier", "dinov2-classifier"])
def test_forwards_in_threads_do_not_mix_their_taps(name):
    case = BY_NAME[name]
    model = get_peft_model(case.base(), E3VAConfig(r=4, init_weights=False)).eval()
    batches = [case.batch(seed=seed) for seed in range(4)]
    expected = [outputs(model, batch) for batch in batches]
    got: dict[int, list] = {i: [] for i in range(4)}

    def work(i: int) -> None:
        torch.manual_seed(i)
        for _ in range(5):
            got[i].append(outputs(model, batches[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, results in got.items():
        assert len(results) == 5
        for result in results:
            assert_same(result, expected[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name, options",
    [("swin-classifier", {"tap_storage": "int8"}), ("vit-classifier", {}), ("timm-vit", {}), ("timm-swin", {})],
)
def test_compiled_in_one_graph_it_gives_the_same_outputs_and_gradients(name, options):
    case = BY_NAME[name]
    model = get_peft_model(case.base(), E3VAConfig(r=4, init_weights=False, **options)).train()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    graphs = []
    for seed in range(3):
        batch = case.training_batch(seed=seed)
        left, right = compiled(**batch), model(**batch)
        torch.testing.assert_close(left["logits"], right["logits"], rtol=1e-4, atol=1e-5)
        loss_of(left).backward(), loss_of(right).backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[2]  # in the first step transformers notes the kind of labels, which compiles once more
    for (key, a), (_, b) in zip(twin.named_parameters(), model.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), key
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=key)


def replica_of(model: nn.Module, shift: float) -> nn.Module:
    """What `nn.DataParallel` makes of a model for another device, with other weights so that one can tell.

    PyTorch's own `replicate` does the same, but only to GPUs.
    """
    twins = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, twin in twins.items():
        for name, item in module._modules.items():
            setattr(twin, name, None if item is None else twins[item])
        for name, parameter in module._parameters.items():
            setattr(twin, name, None if parameter is None else parameter.detach() * (1 + shift))
    return twins[model]


@pytest.mark.parametrize("name", ["swin-classifier", "vit-classifier", "timm-vit", "timm-swin"])
def test_a_replica_runs_on_its_own_weights(name):
    case = BY_NAME[name]
    model = get_peft_model(case.base(), E3VAConfig(r=4, init_weights=False)).eval()
    before = outputs(model, case.batch())
    assert_same(outputs(replica_of(model, 0.0), case.batch()), before)
    got = outputs(replica_of(model, 0.1), case.batch())
    assert_same(outputs(model, case.batch()), before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert_same(got, outputs(model, case.batch()))
