"""Classifier on few labeled images: the same as scikit-learn's on the same embeddings, from the command to ONNX."""

import csv
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import save_checkpoint
from earlier.tiny import earlier_tiny
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from linear_classifier import LinearClassifierMethod
from moco import SelfSupervisedMethod
from model_params import EncoderAndDataParams
from self_supervised import __main__, classify
from self_supervised.embeddings.embed import embed
from self_supervised.embeddings.parquet import read_embeddings
from self_supervised.evaluation.classifier import DECAYS_OF_FEW, ImageClassifier, classifier_of, fit_few, fold_of_each
from self_supervised.evaluation.probes import DECAY_OF_FEW
from self_supervised.exports import fresh, verify
from self_supervised.networks.encoders import get_encoder
from self_supervised.networks.frozen_encoder import Encoder, Report
from self_supervised.networks.pretrained import load_encoder

MANUAL = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
SCRIPT = re.search(r"^## From an image file to .*?```python\n(.*?)```", MANUAL, re.MULTILINE | re.DOTALL)[1]
assert earlier_tiny  # registers timm:earlier_tiny
NAMES = ("zero", "one", "two")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Scans of three digits: photos/YEAR/NUMBER.png, and 10 of each in labeled/NAME/NUMBER.png."""
    folder = tmp_path_factory.mktemp("images")
    source = load_digits(n_class=3)
    for i, (image, label) in enumerate(zip(source.images[:120], source.target[:120], strict=True)):
        where = folder / "labeled" / NAMES[label] if i < 30 else folder / "photos" / str(2020 + i % 3)
        where.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(image / 16 * 255).astype(np.uint8)).save(where / f"{i:03d}.png")
    return folder


@pytest.fixture
def checkpoint(small, tmp_path):
    return save_checkpoint(SelfSupervisedMethod(small(encoder_arch="timm:earlier_tiny")), tmp_path / "encoder.ckpt")


def run(*arguments) -> None:
    __main__.main([*map(str, arguments), *(["--num_workers", "0"] if arguments[0] == "classify" else [])])


def rows_of(file) -> list[dict[str, str]]:
    with open(file, newline="") as opened:
        return list(csv.DictReader(opened))


@pytest.mark.parametrize(("n", "width", "n_classes"), [(60, 200, 3), (90, 20, 4), (40, 100, 2)])
def test_the_classifier_is_the_best_of_scikit_learns_in_cross_validation(n, width, n_classes):
    rng = np.random.default_rng(n)
    y = np.arange(n) % n_classes
    centers = rng.normal(size=(n_classes, width)) / width**0.25
    x, others = (rng.normal(size=(n, width)) + centers[y] for _ in range(2))
    fit = fit_few(torch.from_numpy(x).float(), torch.from_numpy(y))
    folds = PredefinedSplit(fold_of_each(y))
    scaled = StandardScaler().fit_transform(x)
    losses = {}
    for decay in DECAYS_OF_FEW:
        model = LogisticRegression(C=1 / decay, max_iter=10_000, tol=1e-8)
        losses[decay] = log_loss(y, cross_val_predict(model, scaled, y, cv=folds, method="predict_proba"))
    assert fit.decay == min(losses, key=losses.get)
    chosen = LogisticRegression(C=1 / fit.decay, max_iter=10_000, tol=1e-8)
    assert np.array_equal(fit.predicted, cross_val_predict(chosen, scaled, y, cv=folds))
    theirs = make_pipeline(StandardScaler(), chosen).fit(x, y)
    ours = fit.head(torch.from_numpy(others).float()).softmax(1).numpy()
    assert np.abs(ours - theirs.predict_proba(others)).max() < 1e-3
    assert np.array_equal(ours.argmax(1), theirs.predict(others))


def test_the_classifier_of_an_encoder_of_images_with_several_labels_is_read_back(small, tmp_path):
    params = EncoderAndDataParams(encoder_arch="small_cnn", dataset_name="voc07", transform_crop_size=32)
    encoder = Encoder(get_encoder(params)[0], params, Report("", "", "small_cnn", 2, ()))
    ImageClassifier(encoder, torch.nn.Linear(256, 2), ["a", "b"]).save(tmp_path / "c.pt")
    found = classifier_of(load_encoder(tmp_path / "c.pt"))
    images = torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8)
    assert found.class_names == ["a", "b"] and torch.equal(found.encoder.embed(images), encoder.embed(images))


def test_folds_are_stratified_and_a_single_image_is_never_held_out():
    target = np.repeat([0, 1, 2, 3], [11, 4, 2, 1])
    fold = fold_of_each(target)
    assert fold[17] == -1 and (fold[:17] >= 0).all()
    assert max(np.bincount(fold[:17])) - min(np.bincount(fold[:17])) <= 1
    assert len(set(fold[11:15])) == 4 and fold[15] != fold[16] and max(np.bincount(fold[:11])) == 3
    alone = fit_few(torch.randn(3, 8), torch.arange(3))
    assert alone.decay == DECAY_OF_FEW and (alone.predicted == -1).all()


def test_predictions_are_those_of_scikit_learn_on_the_embeddings(images, checkpoint, tmp_path, capsys):
    photos = tmp_path / "photos"
    shutil.copytree(images / "photos", photos)
    (photos / "2021" / "broken.png").write_bytes(b"no image")
    for option in ("--out", "--classifier"):
        with pytest.raises(SystemExit, match=f"{option[2:]}=.*: this file is read, and would be overwritten"):
            others = {"--out": "p.csv", option: checkpoint}
            run("classify", checkpoint, "--labeled", images / "labeled", "--apply", photos, *sum(others.items(), ()))
    run("classify", checkpoint, "--labeled", images / "labeled", "--apply", photos, "--out", "p.csv")
    printed = capsys.readouterr().out
    rows = rows_of("p.csv")
    assert list(rows[0]) == ["file", "class", "probability", "one", "two", "zero"]
    (broken,) = [row for row in rows if row["file"] == "2021/broken.png"]
    assert set(broken.values()) == {"2021/broken.png", ""} and "unreadable: 2021/broken.png" in printed
    rows.remove(broken)

    options = {"batch_size": 16, "num_workers": 0, "device": "cpu", "skip_unreadable": True}
    embed(checkpoint, images / "labeled", "labeled.parquet", **options)
    embed(checkpoint, photos, "photos.parquet", **options)
    _, x, y = read_embeddings("labeled.parquet")
    paths, others, _ = read_embeddings("photos.parquet")
    decay = float(re.search(r"l2 (\S+)", printed)[1])
    model = LogisticRegression(C=1 / decay, max_iter=10_000, tol=1e-8)
    theirs = make_pipeline(StandardScaler(), model).fit(x.astype(float), y)
    assert [row["file"] for row in rows] == paths == sorted(paths)
    assert [row["class"] for row in rows] == theirs.predict(others).tolist()
    ours = np.array([[float(row[name]) for name in theirs.classes_] for row in rows])
    assert np.abs(ours - theirs.predict_proba(others)).max() < 1e-3
    assert [float(row["probability"]) for row in rows] == ours.max(1).tolist()
    truth = [NAMES[load_digits(n_class=3).target[int(Path(path).stem)]] for path in paths]
    assert accuracy_score(truth, [row["class"] for row in rows]) > 0.7  # a random encoder

    names = np.unique(y)
    folds = PredefinedSplit(fold_of_each(np.searchsorted(names, y)))
    held_out = cross_val_predict(theirs[1], StandardScaler().fit_transform(x.astype(float)), y, cv=folds)
    assert f"{100 * accuracy_score(y, held_out):.1f} % of 30 held-out images" in printed
    for name in names:
        right = int(((held_out == name) & (np.array(y) == name)).sum())
        assert re.search(rf"^{name} +{(np.array(y) == name).sum()}  {right}$", printed, re.MULTILINE)


def test_patterns_select_the_images_to_classify_and_are_told(images, checkpoint, tmp_path, capsys):
    command = ["classify", checkpoint, "--labeled", images / "labeled", "--apply", images / "photos"]
    run(*command, "--exclude_patterns", "2021/*", "--out", "others.csv")
    assert {row["file"].split("/")[0] for row in rows_of("others.csv")} == {"2020", "2022"}
    printed = capsys.readouterr().out
    assert "photos: 60 images; passed over: 30 by exclude_patterns=['2021/*']" in printed
    assert "labeled: 30 labeled images\n" in printed


@pytest.mark.slow
def test_the_file_of_the_classifier_is_applied_exported_and_read_by_the_method(
    images, checkpoint, tmp_path, monkeypatch, trainer, capsys
):
    run("classify", checkpoint, "--labeled", images / "labeled", "--apply", images / "photos", "--out", "p.csv")
    run("classify", "p.classifier.pt", "--apply", images / "photos", "--out", "again.csv")
    assert Path("again.csv").read_text() == Path("p.csv").read_text()
    rows = rows_of("p.csv")
    files = [images / "photos" / row["file"] for row in rows]
    expected = np.array([[float(row[name]) for name in sorted(NAMES)] for row in rows])

    method = LinearClassifierMethod.load_from_checkpoint("p.classifier.pt")
    assert method.hparams.class_names == sorted(NAMES) and method.hparams.data_path is None
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(file)))[None] for file in files])
    logits = torch.cat(trainer().predict(method, torch.utils.data.DataLoader(pixels, batch_size=50)))
    assert np.abs(logits.softmax(1).numpy() - expected).max() < 1e-4
    kept, trained = (load_encoder(file).model.state_dict() for file in ("p.classifier.pt", checkpoint))
    assert all(torch.equal(kept[name], weight) for name, weight in trained.items())

    def in_this_process(command, cwd, **_):
        with monkeypatch.context() as patch:
            patch.chdir(cwd)
            fresh.main(*command[3:])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(verify, "subprocess", SimpleNamespace(run=in_this_process))
    run("export", "p.classifier.pt", "--format", "onnx")
    assert "of the largest; the classifier is in it, too" in capsys.readouterr().out
    shutil.move("p.classifier.onnx", "encoder.onnx")  # as the script of the manual names it
    facts = onnxruntime.InferenceSession("encoder.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(facts["class_names"]) == sorted(NAMES) and "probabilities" in facts["load"]
    script = SCRIPT.replace('["embeddings"]', '["probabilities"]').partition("for file in sys.argv")[0]
    names: dict = {}
    exec(script, names)
    assert np.abs(np.array([names["embed"](file) for file in files]) - expected).max() < 1e-4


def test_an_export_with_other_probabilities_is_refused():
    ours = torch.tensor([[0.9, 0.1]])
    assert verify.checked_difference("probabilities", np.array([[0.9001, 0.0999]]), ours) < 1e-3
    with pytest.raises(RuntimeError, match="different probabilities"):
        verify.checked_difference("probabilities", np.array([[0.1, 0.9]]), ours)


def test_a_classifier_may_write_the_predictions_beside_it_again(images, checkpoint, tmp_path):
    photos, out = images / "photos", tmp_path / "predictions.csv"
    run("classify", checkpoint, "--labeled", images / "labeled", "--apply", photos, "--out", out)
    first = out.read_text()
    run("classify", tmp_path / "predictions.classifier.pt", "--apply", photos, "--out", out)
    assert out.read_text() == first


def test_a_checkpoint_of_the_linear_stage_is_applied(images, checkpoint, trainer, tmp_path):
    """Its names are those of its data set: here packed digits, which have none, so their numbers."""
    linear = LinearClassifierMethod.from_moco_checkpoint(checkpoint, batch_size=64, normalize_features=True, lr=0.3)
    fit = trainer(limit_train_batches=1.0)
    fit.fit(linear)
    fit.save_checkpoint(tmp_path / "linear.ckpt")
    run("classify", "linear.ckpt", "--apply", "digits/test", "--out", "p.csv")
    found = np.array([[float(row[str(i)]) for i in range(10)] for row in rows_of("p.csv")])
    expected = torch.cat(fit.predict(linear)).softmax(1).numpy()
    assert np.abs(found - expected).max() < 1e-4


def test_labeled_images_that_are_not_used_are_told_and_lists_give_labels(images, checkpoint, tmp_path, capsys):
    labeled = tmp_path / "few"
    shutil.copytree(images / "labeled", labeled / "images")
    files = [file for name in NAMES for file in sorted((labeled / "images" / name).iterdir())[:4]]
    apply = ("--apply", images / "photos", "--out", tmp_path / "p.csv")
    with pytest.raises(SystemExit, match=r"of 1 class \(images\)\. .*a line PATH,CLASS for each into .*few/train.txt"):
        run("classify", checkpoint, "--labeled", labeled, *apply)
    lines = [f"{file.relative_to(labeled)},{file.parent.name}" for file in files]
    (labeled / "labels.csv").write_text("\n".join(lines))
    with pytest.raises(SystemExit, match="labels.csv' is a file. Pass its directory, .*PATH,CLASS in a train.txt"):
        run("classify", checkpoint, "--labeled", labeled / "labels.csv", *apply)
    lines[0] = lines[0].partition(",")[0]
    (labeled / "train.txt").write_text("\n".join(lines))
    for file in files[8:]:
        file.write_bytes(b"")
    run("classify", checkpoint, "--labeled", labeled, *apply)
    printed = capsys.readouterr().out
    assert f"few: 11 labeled images; passed over: 1 without a label (such as images/zero/{files[0].name})" in printed
    assert "warning: classes without a readable image, which are never predicted: two\n" in printed
    assert list(rows_of(tmp_path / "p.csv")[0])[3:] == ["one", "zero"]


def test_few_images_are_hinted_at_and_refusals_say_what_to_do(images, checkpoint, tmp_path, capsys, monkeypatch):
    labeled = tmp_path / "few"
    for name, n in (("zero", 3), ("two", 1)):
        (labeled / name / "nested").mkdir(parents=True)
        for file in sorted((images / "labeled" / name).iterdir())[:n]:
            shutil.copy(file, labeled / name / "nested")
    apply = ("--apply", images / "photos", "--out", tmp_path / "new" / "p.csv", "--classifier", tmp_path / "c.pt")
    run("classify", checkpoint, "--labeled", labeled, *apply)
    printed = capsys.readouterr().out
    assert "few: 4 labeled images\n" in printed and "hint: classes with fewer than 3 images: two (1)." in printed
    assert classifier_of(load_encoder(tmp_path / "c.pt")).class_names == ["two", "zero"]
    next((labeled / "two").rglob("*.png")).write_bytes(b"")
    with pytest.raises(SystemExit, match=r"labeled=.*few: 3 readable images have a label, of 1 class \(zero\). Put"):
        run("classify", checkpoint, "--labeled", labeled, *apply)
    shutil.rmtree(labeled / "two")
    with monkeypatch.context() as context, pytest.raises(SystemExit, match="few: 3 images have a label, of 1 class"):
        context.setattr(Encoder, "embed", None)  # it is refused before
        run("classify", checkpoint, "--labeled", labeled, *apply)
    with pytest.raises(SystemExit, match="c.pt' is written only if a classifier is trained"):
        run("classify", checkpoint, *apply)
    with pytest.raises(SystemExit, match=r"labeled=None: .*encoder.ckpt holds no classifier. Pass a directory"):
        run("classify", checkpoint, *apply[:-2])
    for options in (["--image_key", "jpg"], ["--label_key", "cls", "--labeled", labeled], ["--labels_from", "none"]):
        with pytest.raises(SystemExit, match=f"{options[0][2:]}: no effect. Leave it out"):
            run("classify", checkpoint, *apply[:-2], *options)
    shutil.copytree(labeled / "zero", labeled / "probability")
    with pytest.raises(SystemExit, match="class 'probability': a column of the CSV file has this name. Rename"):
        run("classify", checkpoint, "--labeled", labeled, *apply)
    content = torch.load(tmp_path / "c.pt", weights_only=True)
    content["hyper_parameters"]["class_names"] = ["file", "zero"]  # as of a LinearClassifierMethod
    torch.save(content, tmp_path / "named.pt")
    with pytest.raises(SystemExit, match="class 'file': a column of the CSV file has this name. Rename"):
        run("classify", tmp_path / "named.pt", *apply[:-2])
    (labeled / "probability").rename(labeled / "train")
    with pytest.raises(SystemExit, match="few' has splits, and images outside them, such as zero/nested"):
        run("classify", checkpoint, "--labeled", labeled, *apply)
    with pytest.raises(ValueError, match="out=.*is a directory"):
        classify.classify(checkpoint, images / "photos", tmp_path, labeled=labeled)
