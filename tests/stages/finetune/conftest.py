import pytest
import torch

from tests.stages.finetune.project import make_project


@pytest.fixture(autouse=True)
def one_thread():
    """A model this small is slower on several threads, much slower where other work has the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(make_project(tmp_path))
    return tmp_path
