"""What the documents say can be done: commands parse, the Python example runs, files and links exist."""

import dataclasses
import re
import shlex
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

import cup3
from checkpoint import RunFolder, collect, named_variables
from config import (
    Config,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
    check,
    to_dict,
)
from dataset import paper_flowers
from generate import make_diffusion, make_vae
from input_pipeline import load_data

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    file for folder in ("", "docs", "dataset", "benchmarks") for file in sorted((ROOT / folder).glob("*.md"))
]
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
MARKED = re.compile(r"^<!-- test: (\S+) -->\n+```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^<!-- test: python -->\n+```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
ANCHOR = re.compile(r"\]\((?![a-z]+:)([^)#\s]+)#([^)\s]+)\)")
LINK = re.compile(r"\]\(([^)#\s]+)|(?:src|href)=\"([^\"#]+)\"")


def commands(text):
    """The commands of a block as lists of words, split as a shell splits them; redirections end a command."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split = True
        words = []
        for word in lexer:
            if set(word) <= set("&|;<>"):
                yield words
                words = []
            else:
                words.append(word)
        if words:
            yield words


def test_commands_are_split_as_a_shell_splits_them():
    text = '# first\npython cup3.py generate --prompt "a red; b" \\\n  --count 2  # two\ncd x && A=1 python a.py > b\n'
    assert list(commands(text)) == [
        ["python", "cup3.py", "generate", "--prompt", "a red; b", "--count", "2"],
        ["cd", "x"],
        ["A=1", "python", "a.py"],
        ["b"],
    ]


def scripts():
    """(script, its words) of each command with a `.py` file that a document shows."""
    for file in DOCUMENTS:
        for block in BLOCK.findall(file.read_text()):
            for words in commands(block):
                place = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
                if place is not None:
                    shown = f"{file.relative_to(ROOT)}: {' '.join(words)}"
                    yield pytest.param(words[place], words[place + 1 :], id=shown)


@pytest.mark.parametrize(("script", "words"), list(scripts()))
def test_every_command_that_is_shown_parses(script, words, tmp_path, monkeypatch):
    assert (ROOT / script).exists()
    monkeypatch.chdir(tmp_path)
    for word in words:
        if word.startswith("weights/"):  # files of the user's
            Path(word).parent.mkdir(exist_ok=True)
            Path(word).touch()
    if script != "cup3.py":
        return
    try:
        command, settings = cup3.parse(words)
    except SystemExit as end:
        assert end.code == 0, "the command line refuses it"  # 0: it asked for help
        return
    if command in cup3.TRAININGS:
        check(settings, autoencoder_alone=command == "train-vae")


def test_the_commands_of_the_autoencoders_guide_are_found():
    trains = {parameter.values[1][0] for parameter in scripts() if "autoencoder.md" in parameter.id}
    assert trains == {"train-vae", "--vae-from", "--preset"}  # the last two are `train`'s


def flags_of(kind, prefix=""):
    """The flags of a dataclass of settings and of those within it, without dashes in front."""
    flags = set()
    for item in dataclasses.fields(kind):
        name = prefix + item.name.replace("_", "-")
        is_part = dataclasses.is_dataclass(item.default_factory)
        flags |= {name} | (flags_of(item.default_factory, f"{name}.") if is_part else set())
    return flags


def test_the_autoencoders_guide_names_every_setting_of_its_training_and_no_unknown_one():
    text = (ROOT / "docs" / "autoencoder.md").read_text()
    named = {flag.replace(".no-", ".") for flag in re.findall(r"(?<!-)--([a-z][a-z0-9.-]*[a-z0-9])", text)}
    known = flags_of(cup3.TrainVAE)
    wanted = {flag for flag in known if flag.startswith(("vae.", "vae-training.", "adversarial."))}
    assert len(wanted) > 40
    assert wanted - named == set()
    assert named - known == {"help", "logdir"}  # the second is TensorBoard's


@pytest.fixture(scope="module")
def marked():
    """The README's marked blocks, as lists of commands."""
    blocks = MARKED.findall((ROOT / "README.md").read_text())
    return {mark: list(commands(block)) for mark, block in blocks if mark != "parse"}


def test_the_two_commands_are_there(marked):
    assert marked.keys() == {"install-and-run", "install-and-test"}
    run, test = marked["install-and-run"], marked["install-and-test"]
    assert ["python", "cup3.py"] in run
    assert test[-1][:3] == ["python", "-m", "pytest"]


@pytest.mark.parametrize("mark", ["install-and-run", "install-and-test"])
def test_what_they_install_is_there(marked, mark):
    files = [word for words in marked[mark] if "install" in words for word in words if word.endswith(".txt")]
    assert files
    assert all((ROOT / file).exists() for file in files)


@pytest.fixture
def tiny_run(tmp_path, monkeypatch):
    """A working folder with a run and the data of the default preset, both tiny."""
    monkeypatch.chdir(tmp_path)
    keras.utils.set_random_seed(0)
    config = Config(
        image_size=32,
        vae=VAEConfig((4, 4), (0, 0), latent_channels=2, groups=2),
        text_encoder=TextEncoderConfig(width=8, layers=1, heads=2),
        unet=UNetConfig((8,), (True,), blocks=0, head_channels=4, groups=4, ff_expansion=1),
    )
    paper_flowers.write(config.data, train=24, test=1, size=32, progress=False)
    vocabulary, vae = load_data(config.data).vocabulary, make_vae(config)
    tensors = {}
    for name, network in zip(("unet", "text_encoder"), make_diffusion(config, vocabulary), strict=True):
        tensors |= collect(named_variables(network), f"ema_{name}")
    with RunFolder.open(config.run, to_dict(config)) as run:
        vocabulary.save(run.vocabulary_path)
        run.finish("vae", collect(named_variables(vae), "vae"), {})
        run.save_best("diffusion", 0.1, 0.1, 0.1, tensors, {"step": 1})
    return tmp_path


def test_the_python_example_runs(tiny_run):
    (example,) = PYTHON.findall((ROOT / "README.md").read_text())
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert int(names["trainer"].optimizer.iterations) == 40
    pictures = {}
    for file in tiny_run.glob("*.png"):
        with Image.open(file) as picture:
            pictures[file.stem] = np.asarray(picture).astype(int)
            assert picture.text["prompt"] == names["sentence"]
    assert pictures.keys() == {"pink_7", "pink_8", "pink_7_trained_on"}
    assert {picture.shape for picture in pictures.values()} == {(32, 32, 3)}
    assert np.abs(pictures["pink_7"] - pictures["pink_7_trained_on"]).max() > 0  # it has learned something


@pytest.fixture
def runs_of_the_guide(tiny_run):
    """The runs that the autoencoder's guide names, tiny: one, and one with other weights of its autoencoder."""
    for name in ("mine-vae-diffusion", "mine-vae", "mine-sharp-vae"):
        shutil.copytree(tiny_run / "runs/paper-flowers", tiny_run / "runs" / name)
    with RunFolder.open("runs/mine-sharp-vae", RunFolder.read("runs/mine-vae").config) as run:
        tensors = {name: value + 0.01 for name, value in run.finished("vae").tensors.items()}
        run.discard("vae")
        run.finish("vae", tensors, {})
    return tiny_run


def run_guide(number):
    """The names that a Python example of the autoencoder's guide leaves behind."""
    names = {}
    example = PYTHON.findall((ROOT / "docs" / "autoencoder.md").read_text())[number]
    exec(compile(example, "autoencoder.md", "exec"), names)
    return names


@pytest.mark.filterwarnings("ignore:.*has never read|.*kept no averages")
def test_the_guides_other_decoder_draws(runs_of_the_guide):
    names = run_guide(0)
    own, other = (
        RunFolder.read(f"runs/{run}").finished("vae").tensors["vae/decoder.conv_in/kernel"]
        for run in ("mine-vae", "mine-sharp-vae")
    )
    drawn_with = names["networks"].vae.decoder.get_layer("decoder.conv_in").kernel
    assert np.array_equal(drawn_with, other)
    assert not np.array_equal(own, other)
    assert Image.open("sharper.png").size == (32, 32)


def test_the_guides_tiles_rebuild_a_large_picture(runs_of_the_guide):
    rows, columns = np.mgrid[:521, :601]
    large = np.stack([rows % 256, columns % 256, (rows + columns) % 256], -1).astype("uint8")
    Image.fromarray(large).save("large.png")
    names = run_guide(1)
    assert names["vae"].factor == 2
    with Image.open("large_rebuilt.png") as picture:
        rebuilt = np.asarray(picture).astype(int)
    assert rebuilt.shape == (520, 600, 3)
    whole = np.asarray(names["to_images"](names["vae"].reconstruct(names["pixels"])))[0]
    assert np.abs(rebuilt - whole).mean() < 0.1 * whole.std()


def test_the_readme_names_the_flags_of_data_with_their_defaults():
    table = re.search(r"\| flag of `data` .*?\n\n", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    named = {flag: int(value) for flag, value in re.findall(r"`--(\w+) (\d+)`", table)}
    assert cup3.parse(["data"])[1] == cup3.Data(**named)
    assert {*named, "out"} == {item.name for item in dataclasses.fields(cup3.Data)}


@pytest.mark.parametrize("command", ["generate", "evaluate", "data"])
def test_the_readme_names_every_flag_of_a_command_and_no_other(command):
    table = re.search(rf"\| flag of `{command}` .*?\n\n", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    first_cells = [row.split(" | ")[0] for row in table.splitlines()[2:]]
    named = {flag for cell in first_cells for flag in re.findall(r"`--([a-z-]+)", cell)}
    named |= {"gif"} if command == "generate" else set()  # described beside the frames
    known = {item.name.replace("_", "-") for item in dataclasses.fields(cup3.SETTINGS[command])}
    assert named == known


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    targets = [a or b for a, b in LINK.findall(document.read_text())]
    local = [target for target in targets if not re.match(r"[a-z]+:", target)]
    assert [target for target in local if not (document.parent / target).exists()] == []
    for target, anchor in ANCHOR.findall(document.read_text()):
        headings = re.findall(r"^#+ (.*)", (document.parent / target).read_text(), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
