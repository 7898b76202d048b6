"""Through the Hub and back: the real client over HTTP, against a Hub on loopback.

`connect` puts this process in touch with it; one test leaves that to the environment of a fresh process.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import datasets
import pytest
from huggingface_hub import HfApi, constants, snapshot_download, upload_folder
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import _http
from peft import AutoPeftModel, PeftModel, get_peft_model
from rich.console import Console
from transformers import AutoImageProcessor, AutoModelForImageClassification, BitImageProcessor
from transformers import SwinForImageClassification as Swin
from transformers.utils import PushToHubMixin

import e3va_peft
from e3va_peft import E3VAConfig, load_adapter
from e3va_peft.errors import UserError
from e3va_peft.training.config import parse_config
from e3va_peft.training.results import push
from e3va_peft.training.run import train
from tests.helpers import assert_same, outputs
from tests.hub_server import READER, TOKEN, HubServer, connect, hurry
from tests.inputs import classify
from tests.models import BY_NAME, train_steps

CASE = BY_NAME["swin-classifier"]
LABELS = {0: "cat", 1: "dog", 2: "owl"}
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "base_config.json"}
MANY = 1000


def test_pefts_own_class_is_left_as_it_is():
    assert PeftModel._upload_modified_files is PushToHubMixin._upload_modified_files


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hub, and this process logged in to it with an empty cache."""
    with HubServer() as server:
        connect(server, tmp_path / "home", monkeypatch)
        yield server
        _http.close_session()


def fresh_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))


def log_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def base_id(hub):
    """A base model on the Hub with an image processor and other class names than the adapter's."""
    CASE.base().push_to_hub("me/base")
    BitImageProcessor(size={"shortest_edge": 32}, image_mean=[0.1, 0.2, 0.3]).push_to_hub("me/base")
    return "me/base"


@pytest.fixture
def model(base_id):
    """What a user has before the push: base and processor from the Hub, a trained adapter, its results."""
    AutoImageProcessor.from_pretrained(base_id)
    base = Swin.from_pretrained(base_id, id2label=LABELS, label2id={name: i for i, name in LABELS.items()})
    model = get_peft_model(base, E3VAConfig(r=4))
    train_steps(model, CASE.training_batch())
    e3va_peft.record_metrics(model, {"accuracy": 0.875})
    return model


@pytest.fixture
def pushed(hub, model, tmp_path, monkeypatch):
    """The model, after its push, with an empty cache."""
    model.push_to_hub("me/adapter")
    fresh_cache(tmp_path / "second", monkeypatch)
    hub.requests.clear()
    return model


def assert_equal(again, model) -> None:
    assert_same(outputs(again.eval(), CASE.batch()), outputs(model, CASE.batch()), rtol=0, atol=0)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# There


def test_a_push_holds_all_that_loading_takes(hub, pushed):
    files = hub.repos["me/adapter"].files()
    assert set(files) == {*FILES, "preprocessor_config.json"}
    assert b'"base_model_name_or_path": "me/base"' in files["adapter_config.json"]
    assert b'"1": "dog"' in files["base_config.json"]
    assert files["preprocessor_config.json"] == hub.repos["me/base"].files()["preprocessor_config.json"]
    assert len(hub.repos["me/adapter"].commits) == 2  # the Hub's own first one, and the push: whole or not at all


def test_the_pushed_card_has_the_metrics_and_how_to_load(hub, pushed):
    card = hub.repos["me/adapter"].files()["README.md"].decode()
    for text in ("import e3va_peft", "load_adapter(", "| accuracy | 0.875 |", "cat, dog, owl", "library_name: peft"):
        assert text in card
    e3va_peft.record_metrics(pushed, {"accuracy": 0.9375})
    pushed.push_to_hub("me/adapter")
    assert "| accuracy | 0.9375 |" in hub.repos["me/adapter"].files()["README.md"].decode()


def test_a_push_over_a_base_in_a_folder_warns_of_its_path_and_keeps_it_out_of_the_card(hub, tmp_path):
    CASE.base().save_pretrained(tmp_path / "base")
    model = get_peft_model(Swin.from_pretrained(tmp_path / "base"), E3VAConfig(r=4))
    with pytest.warns(UserWarning, match=f"base_model_name_or_path: .*'{tmp_path / 'base'}'"):
        model.push_to_hub("me/adapter")
    assert str(tmp_path) not in hub.repos["me/adapter"].files()["README.md"].decode()


def test_a_card_that_its_user_wrote_on_the_hub_is_kept(hub, pushed):
    own = "---\nlicense: mit\n---\n# My own words\n"
    HfApi().upload_file(path_or_fileobj=own.encode(), path_in_repo="README.md", repo_id="me/adapter")
    pushed.push_to_hub("me/adapter")
    assert hub.repos["me/adapter"].files()["README.md"].decode() == own


def test_a_saved_folder_uploaded_as_it_is_keeps_its_card(hub, model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "adapter")
    HfApi().create_repo("me/adapter")
    upload_folder(repo_id="me/adapter", folder_path=tmp_path / "adapter")
    assert hub.repos["me/adapter"].files() == contents(tmp_path / "adapter")
    assert "| accuracy | 0.875 |" in hub.repos["me/adapter"].files()["README.md"].decode()
    fresh_cache(tmp_path / "second", monkeypatch)
    assert_equal(load_adapter("me/adapter")[0], model)


def test_a_processor_pushed_beside_the_adapter_is_the_one_that_loads(hub, pushed):
    before = hub.repos["me/adapter"].files()
    BitImageProcessor(image_mean=[0.5, 0.6, 0.7]).push_to_hub("me/adapter")
    after = hub.repos["me/adapter"].files()
    assert {path for path in after if after[path] != before.get(path)} == {"preprocessor_config.json"}
    again, processor = load_adapter("me/adapter")
    assert list(processor.image_mean) == [0.5, 0.6, 0.7]
    assert_equal(again, pushed)


# And back


def test_one_call_by_id_rebuilds_everything_equal_to_the_bit(hub, pushed):
    again, processor = load_adapter("me/adapter")
    assert_equal(again, pushed)
    assert again.config.id2label == LABELS
    assert list(processor.image_mean) == [0.1, 0.2, 0.3]
    files = [request.split("/resolve/") for request in hub.requests if "me/adapter/resolve/" in request]
    commits = {path.partition("/")[0] for _, path in files}
    assert commits == {hub.repos["me/adapter"].branches["main"]}  # a push in the meantime cannot mix two adapters
    trainable, _ = load_adapter("me/adapter", is_trainable=True)
    assert trainable.get_nb_trainable_parameters() == pushed.get_nb_trainable_parameters()


LOADERS = {
    "PeftModel": lambda: PeftModel.from_pretrained(Swin.from_pretrained("me/base"), "me/adapter"),
    "AutoPeftModel": lambda: AutoPeftModel.from_pretrained("me/adapter"),
    "AutoModel": lambda: AutoModelForImageClassification.from_pretrained("me/adapter"),
    "transformers": lambda: load_by_transformers(Swin.from_pretrained("me/base")),
}


def load_by_transformers(base):
    base.load_adapter("me/adapter")
    return base


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_the_other_loaders_take_the_id_too(load, pushed):
    assert_equal(load(), pushed)


@pytest.mark.slow
def test_a_fresh_process_needs_nothing_but_the_id(hub, pushed, tmp_path):
    code = (
        "import torch, e3va_peft; torch.set_num_threads(1)\n"
        "model, processor = e3va_peft.load_adapter('me/adapter')\n"
        "x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))\n"
        "print(model.config.id2label[1], processor.image_mean[0], model(pixel_values=x).logits.sum().item())\n"
        "model.push_to_hub('me/again')"
    )
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS"))
    }
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "fresh"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    label, mean, logits = run.stdout.split()[-3:]
    assert (label, mean) == ("dog", "0.1")
    assert float(logits) == pytest.approx(outputs(pushed, CASE.batch())["logits"].sum().item(), rel=1e-6)
    weights = "adapter_model.safetensors"
    assert hub.repos["me/again"].files()[weights] == hub.repos["me/adapter"].files()[weights]


def test_a_revision_pins_the_adapter(hub, pushed):
    first, expected = hub.repos["me/adapter"].branches["main"], outputs(pushed, CASE.batch())
    train_steps(pushed, CASE.training_batch(seed=2))
    pushed.push_to_hub("me/adapter")
    pushed.push_to_hub("me/adapter", revision="wide")
    assert_equal(load_adapter("me/adapter")[0], pushed)
    assert_equal(load_adapter("me/adapter", revision="wide")[0], pushed)
    assert_same(outputs(load_adapter("me/adapter", revision=first)[0], CASE.batch()), expected, rtol=0, atol=0)


def test_an_adapter_with_a_name_of_its_own_loads_from_its_subfolder(hub, base_id, tmp_path, monkeypatch):
    model = get_peft_model(Swin.from_pretrained(base_id), E3VAConfig(r=4, init_weights=False), adapter_name="nuclei")
    model.eval().push_to_hub("me/adapter")
    fresh_cache(tmp_path / "second", monkeypatch)
    assert_equal(load_adapter("me/adapter", subfolder="nuclei")[0], model)
    with pytest.raises(FileNotFoundError, match=r"subfolder='': .*adapter_config\.json"):
        load_adapter("me/adapter")


def test_what_was_loaded_once_loads_again_without_a_connection(hub, pushed, monkeypatch):
    load_adapter("me/adapter")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    again, processor = load_adapter("me/adapter")
    assert_equal(again, pushed)
    assert processor is not None and not hub.requests


def test_a_space_for_an_adapter_on_the_hub_loads_it_and_serves_its_page(hub, pushed, tmp_path, monkeypatch):
    app = pytest.importorskip("e3va_peft.app")
    app.write_space("me/adapter", tmp_path / "space")
    served = []

    def look(blocks: Any) -> None:
        with urlopen(blocks.local_url) as answer:
            served.append(answer.read().decode())

    monkeypatch.setattr(app.gr.Blocks, "block_thread", look)
    runpy.run_path(str(tmp_path / "space" / "app.py"), run_name="__main__")
    assert len(served) == 1 and "e3va: adapter" in served[0] and "cat, dog, owl" in served[0]
    assert any("me/adapter/resolve" in request and "safetensors" in request for request in hub.requests)


# Refused


def test_the_base_is_of_the_commit_that_the_adapter_was_trained_on(hub, pushed):
    commit = hub.repos["me/base"].branches["main"]
    other = CASE.base()
    other.swin.encoder.layers[0].blocks[0].layernorm_before.bias.data += 1
    other.push_to_hub("me/base")
    assert hub.repos["me/base"].branches["main"] != commit
    assert_equal(load_adapter("me/adapter")[0], pushed)
    with pytest.raises(ValueError, match=r"of 'me/base'"):
        PeftModel.from_pretrained(Swin.from_pretrained("me/base"), "me/adapter")


def test_a_private_adapter_and_base_load_with_a_token_and_say_so_without(hub, pushed, monkeypatch):
    log_out(monkeypatch)
    hub.repos["me/adapter"].private = hub.repos["me/base"].private = True
    with pytest.raises(FileNotFoundError, match=r"adapter='me/adapter'.*`hf auth login`.*token="):
        load_adapter("me/adapter")
    again, processor = load_adapter("me/adapter", token=TOKEN)
    assert_equal(again, pushed)
    assert processor is not None


def test_a_refused_token_is_said_to_be_refused(hub, pushed, monkeypatch):
    with pytest.raises(PermissionError, match=r"adapter='me/adapter': .*token="):
        load_adapter("me/adapter", token="hf_wrong")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(PermissionError, match=r"adapter='me/adapter': .*logged in"):
        load_adapter("me/adapter")
    assert_equal(load_adapter("me/adapter", token=False)[0], pushed)


@pytest.mark.parametrize("token", ["hf_wrong", False], ids=["refused", "none"])
def test_a_push_without_a_right_token_changes_nothing(hub, pushed, token):
    before = dict(hub.repos["me/adapter"].commits)
    for repo in ("me/adapter", "me/new"):
        with pytest.raises(HfHubHTTPError, match=r"401[\s\S]*Invalid (credentials|username or password)"):
            pushed.push_to_hub(repo, token=token)
    assert hub.repos["me/adapter"].commits == before and "me/new" not in hub.repos


@pytest.mark.parametrize("logged_in", [True, False], ids=["logged-in", "logged-out"])
@pytest.mark.parametrize("name", ["me/nothing", "nothing", "no id at all"])
def test_a_repository_that_is_not_there_is_named(name, logged_in, hub, monkeypatch):
    if not logged_in:
        log_out(monkeypatch)
    with pytest.raises(FileNotFoundError, match=f"adapter='{name}'"):
        load_adapter(name)


def test_a_revision_that_is_not_there_is_named(pushed):
    with pytest.raises(FileNotFoundError, match="revision='v9': 'me/adapter'"):
        load_adapter("me/adapter", revision="v9")


def test_a_repository_without_an_adapter_is_named(base_id):
    with pytest.raises(FileNotFoundError, match=r"adapter='me/base'.*adapter_config\.json"):
        load_adapter(base_id)


def test_a_base_model_that_is_gone_is_named_with_its_adapter(hub, pushed):
    del hub.repos["me/base"]
    with pytest.raises(OSError, match=r"'me/base'.*base_model_name_or_path"):
        load_adapter("me/adapter")


@pytest.mark.parametrize("name", ["{}/base", "../base", "base"])
def test_a_path_that_an_adapter_on_the_hub_names_is_not_followed_before_it_is_downloaded(
    name, base_id, tmp_path, monkeypatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path if name == "base" else tmp_path / "here")
    place = name.format(tmp_path)
    Swin.from_pretrained(base_id).save_pretrained(place)
    get_peft_model(Swin.from_pretrained(place), E3VAConfig(r=4)).push_to_hub("me/adapter")
    with pytest.raises(ValueError, match=f"'{place}' is a path.*hf download me/adapter"):
        load_adapter("me/adapter")
    load_adapter(snapshot_download("me/adapter"))


# Cut


def test_a_push_resumes_after_a_cut(hub, model):
    hub.requests.clear()
    hub.cuts["put_object"] = 1
    model.push_to_hub("me/adapter")
    assert sum(request.startswith("PUT") for request in hub.requests) == 2
    assert_equal(load_adapter("me/adapter")[0], model)


@pytest.mark.parametrize("cut", ["put_object", "commit"])
def test_a_push_that_stays_cut_leaves_both_sides_as_they_were(cut, hub, model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "adapter")
    before = contents(tmp_path / "adapter")
    hub.cuts[cut] = MANY
    with pytest.raises((RuntimeError, HTTPError), match=r"uploading 'adapter_model|isconnected|reset|closed|ipe"):
        model.push_to_hub("me/adapter")
    with pytest.raises((RuntimeError, HTTPError)):
        upload_folder(repo_id="me/adapter", folder_path=tmp_path / "adapter")
    assert hub.repos["me/adapter"].files() == {}
    assert contents(tmp_path / "adapter") == before
    hub.cuts.clear()
    upload_folder(repo_id="me/adapter", folder_path=tmp_path / "adapter")
    assert hub.repos["me/adapter"].files() == before
    fresh_cache(tmp_path / "second", monkeypatch)
    assert_equal(load_adapter("me/adapter")[0], model)


def test_a_load_resumes_where_it_was_cut(hub, pushed):
    hub.cuts["get_object"] = 1
    assert_equal(load_adapter("me/adapter")[0], pushed)
    assert sum(request.startswith("GET /store") for request in hub.requests) == 3  # base, adapter, and one's rest


@pytest.mark.parametrize("loaded", [(), ("me/adapter",)], ids=["adapter", "base"])
def test_a_load_that_stays_cut_keeps_nothing_half(loaded, hub, pushed, tmp_path):
    for repo in loaded:
        HfApi().snapshot_download(repo)
    hub.cuts["get_object"] = MANY
    message = r"base model 'me/base' cannot be loaded.*closed" if loaded else r"connection broke.*call again.*closed"
    with pytest.raises(OSError if loaded else ConnectionError, match=rf"adapter='me/adapter': .*{message}"):
        load_adapter("me/adapter")
    cached = [path for path in (tmp_path / "second").rglob("*") if path.is_file()]
    assert not [path for path in cached if path.suffix == ".incomplete"]
    assert not [path for path in cached if path.name == "model.safetensors"]
    assert len([path for path in cached if path.name == "adapter_model.safetensors"]) == len(loaded)
    hub.cuts.clear()
    assert_equal(load_adapter("me/adapter")[0], pushed)


STATUSES = (401, 404, 429, 500)


@pytest.mark.parametrize("loaded", [(), ("me/adapter",)], ids=["adapter", "base"])
def test_a_hub_that_refuses_or_is_silent_is_one_clear_error_and_leaves_nothing_half(
    loaded, hub, pushed, tmp_path, monkeypatch
):
    hurry(monkeypatch)
    requests = ("resolve", "get_object") if loaded else ("info", "tree", "resolve", "get_object")
    faults = [(name, status) for name in requests for status in (*STATUSES, "silent")]
    for number, (name, status) in enumerate(faults):
        if status == "silent" and name in ("info", "tree"):
            continue  # the client waits for these without a limit
        fresh_cache(tmp_path / str(number), monkeypatch)
        for repo in loaded:
            HfApi().snapshot_download(repo)
        if status == "silent":
            hub.silent.add(name)
        else:
            hub.statuses[name] = status
        with pytest.raises(OSError, match=r"^adapter='me/adapter': ") as error:
            load_adapter("me/adapter")
        assert len(str(error.value)) < 900, (name, status)
        hub.well()
        assert_equal(load_adapter("me/adapter")[0], pushed)


def test_a_hub_that_cannot_be_reached_is_named(hub, pushed):
    hub.shutdown()
    hub.server_close()
    _http.close_session()  # a connection that stays open would still be answered
    with pytest.raises(ConnectionError, match=r"adapter='me/adapter'"):
        load_adapter("me/adapter")


def run_config(root: Path, **training):
    return parse_config(classify(root, num_train_epochs=1, push_to_hub=True, **training))


def test_e3va_train_pushes_its_adapter_when_it_is_finished(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    record = train(run_config(tmp_path, hub_model_id="me/colors", hub_private_repo=True))
    files = hub.repos["me/colors"].files()
    local = contents(tmp_path / "run" / "adapter")
    assert {name: files[name] for name in local} == local
    assert f"| accuracy | {record['metrics']['accuracy']:.4g} |" in files["README.md"].decode()
    assert not any("checkpoint" in name for name in files)
    assert len(hub.repos["me/colors"].commits) == 2  # the Hub's own first one, and the adapter


def test_a_repository_without_an_owner_is_that_of_the_token(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    train(run_config(tmp_path, hub_model_id="colors"))
    assert "adapter_config.json" in hub.repos["me/colors"].files()


def test_a_token_in_a_config_is_not_written_down(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    train(run_config(tmp_path, hub_model_id="me/colors", hub_token=TOKEN))
    written = [
        path for path in (tmp_path / "run").rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()
    ]
    assert not written


def test_e3va_train_finds_a_refused_token_before_it_trains(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    with pytest.raises(UserError, match=r"hub_model_id='me/colors': .*`hf auth login`"):
        train(run_config(tmp_path, hub_model_id="me/colors", hub_token="hf_wrong"))
    HfApi().create_repo("me/there")
    with pytest.raises(UserError, match=r"hub_model_id='me/there': .*403.*`hf auth login`"):
        train(run_config(tmp_path, hub_model_id="me/there", hub_token=READER))
    with pytest.raises(UserError, match=r"training.hub_model_id"):
        train(run_config(tmp_path))  # nothing is there yet to lose, so the settings may change
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize("name", ["create_repo", "check_write", "preupload", "put_object", "commit"])
def test_a_hub_that_refuses_a_run_is_one_clear_error_and_costs_no_training(name, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    config = run_config(tmp_path, hub_model_id="me/colors", eval_strategy="no")
    if name in ("create_repo", "check_write"):  # before training: nothing is begun
        for status in (*STATUSES, "cut"):
            hub.cuts[name] = MANY * (status == "cut")
            hub.statuses[name] = 0 if status == "cut" else status
            with pytest.raises(UserError, match=r"hub_model_id='me/colors': the Hub does not let you"):
                train(config)
            assert not (tmp_path / "run").exists() and all(not repo.files() for repo in hub.repos.values())
        return
    hub.statuses[name] = 500
    with pytest.raises(UserError, match=r"hub_model_id='me/colors': could not be pushed .*500.*`hf upload"):
        train(config)
    for status in (*STATUSES, "cut"):
        hub.cuts[name] = MANY * (status == "cut")
        hub.statuses[name] = 0 if status == "cut" else status
        with pytest.raises(UserError, match=r"hub_model_id='me/colors': could not be pushed .*`hf upload"):
            push(tmp_path / "run" / "adapter", "me/colors", None, Console())
    assert hub.repos["me/colors"].files() == {}
    hub.well()
    push(tmp_path / "run" / "adapter", "me/colors", None, Console())
    assert hub.repos["me/colors"].files() == contents(tmp_path / "run" / "adapter")
    assert (tmp_path / "run" / "metrics.json").is_file()


@pytest.mark.parametrize("status", [*STATUSES, "cut", "silent"])
def test_a_pretrained_model_that_the_hub_does_not_give_is_named_before_training(
    status, hub, base_id, tmp_path, monkeypatch
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    fresh_cache(tmp_path / "second", monkeypatch)
    hurry(monkeypatch)
    values = classify(tmp_path, num_train_epochs=1, eval_strategy="no") | {"model": base_id}
    for name in ("get_object",) if status == "cut" else ("resolve", "get_object"):
        hub.cuts[name] = MANY * (status == "cut")
        hub.silent |= {name} if status == "silent" else set()
        hub.statuses[name] = status if isinstance(status, int) else 0
        with pytest.raises(UserError, match=r"^model='me/base': no such folder .* cannot be loaded"):
            train(parse_config(values))
        assert not (tmp_path / "run").exists()
        hub.well()
    train(parse_config(values))


def test_a_push_that_fails_after_training_leaves_the_finished_run_whole(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")

    def upload_folder(self, **kwargs):
        raise HTTPError("connection reset")

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    with pytest.raises(UserError, match=r"adapter.*`hf upload"):
        train(run_config(tmp_path, hub_model_id="me/colors"))
    assert (tmp_path / "run" / "metrics.json").is_file()
    load_adapter(tmp_path / "run" / "adapter")
