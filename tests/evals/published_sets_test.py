"""Published data sets from files on disk, and zero-shot, retrieval and video on the demo model."""

import csv
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from internvl_jax.data import scenes, text
from internvl_jax.evals import datasets, evaluator, files, prompts, video


def _scene(pair, number=0):
    """A picture of a colour-shape class."""
    index = scenes.SEEN_PAIRS.index(pair) + number * len(scenes.SEEN_PAIRS)
    return scenes.render([scenes.scene("test_single", index)], 64)[0]


PAIRS = scenes.SEEN_PAIRS[:6]


def _folders(root, name, classes):
    for label, pair in classes.items():
        for number in range(3):
            path = root / name / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(_scene(pair, number)).save(path)


def test_zero_shot_of_class_folders(tmp_path, figures):
    _folders(tmp_path, "pets", {"_".join(pair): pair for pair in PAIRS})
    options = dict(datasets=["pets"], root=str(tmp_path), partial=True, languages=["en"])
    trained, untrained = figures("zero_shot", **options)
    assert set(trained) == {f"pets.en.{m}" for m in ("top1", "top5", "mean_per_class")}
    assert trained["pets.en.top1"] >= 0.8 > untrained["pets.en.top1"]


def test_the_tar_layout_gives_the_pictures_labels_and_names(tmp_path):
    folder = tmp_path / "wds_dtd"
    (folder / "test").mkdir(parents=True)
    (folder / "classnames.txt").write_text("red thing\nblue thing\n")
    pixels = np.zeros((4, 4, 3), np.uint8)
    for shard in (0, 1, 10, 2):
        with tarfile.open(folder / "test" / f"{shard}.tar", "w") as archive:
            pixels[:] = shard
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "png")
            for suffix, data in (("png", buffer.getvalue()), ("cls", str(shard % 2).encode())):
                info = tarfile.TarInfo(f"s{shard:04d}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    pictures, labels, names = datasets.classification("dtd", tmp_path, 4, partial=True)
    assert names == ["red thing", "blue thing"] and labels.tolist() == [0, 1, 0, 0]
    assert pictures[:][:, 0, 0, 0].tolist() == [0, 1, 2, 10]  # shards in the order of their numbers
    assert pictures.take([3, 1])[:, 0, 0, 0].tolist() == [10, 1]


def test_only_the_classes_of_imagenet_a_compete():
    wnids = [f"n{number:08d}" for number in range(0, 5000, 5)]
    assert prompts.imagenet_classes(wnids) == list(range(1000))
    assert prompts.imagenet_classes(["n00000010", "n00004995"], wnids) == [2, 999]
    with pytest.raises(files.DatasetError, match="1 of 2 class folders are none"):
        prompts.imagenet_classes(["n00000010", "n00000011"], wnids)


def test_own_templates_are_labelled_and_languages_listed(monkeypatch):
    monkeypatch.setattr(prompts, "package", lambda: None)
    prompts._file.cache_clear()
    made = prompts.build("pets", "en", ["great_dane", "pug"])
    prompts._file.cache_clear()
    assert made.classes == ["great dane", "pug"] and "not comparable" in made.source
    assert made.texts[1][0] == "a photo of pug"
    with pytest.raises(files.DatasetError, match="'xx'; there are en, zh, ja, ar, it"):
        prompts.build("pets", "xx", ["pug"])


def test_numbered_class_folders_are_in_numerical_order(tmp_path):
    _folders(tmp_path, "imagenetv2", {str(n): PAIRS[n % 6] for n in (0, 2, 10)})
    _, labels, names = datasets.classification("imagenetv2", tmp_path, 8, partial=True)
    assert names == ["0", "2", "10"] and labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3


def test_a_missing_or_different_set_is_refused_with_what_is_expected(tmp_path):
    with pytest.raises(files.DatasetError, match=r"cifar10: .*missing.*put cifar10/.val/.<class>"):
        datasets.classification("cifar10", tmp_path, 8)
    _folders(tmp_path, "cifar10", {"red": PAIRS[0]})
    with pytest.raises(files.DatasetError, match=r"1 classes .*10 and 3 images .*10000"):
        datasets.classification("cifar10", tmp_path, 8)
    with pytest.raises(files.DatasetError, match="did you mean 'cifar100'"):
        datasets.classification("cifar1000", tmp_path, 8)
    with pytest.raises(files.DatasetError, match="there are flickr30k, coco, flickr30k-cn"):
        datasets.captioned("flickr", "retrieval", tmp_path, "en", 8)
    with pytest.raises(files.DatasetError, match="no captions in 'de'; there are en, es"):
        datasets.captioned("xtd", "retrieval", tmp_path, "de", 8)


def test_tars_of_vtab_have_its_name_in_front(tmp_path):
    (tmp_path / "wds_vtab-dtd/test").mkdir(parents=True)
    with pytest.raises(files.DatasetError, match=r"no tar files in .*wds_vtab-dtd/test"):
        datasets.classification("dtd", tmp_path, 8)


def test_birdsnap_has_the_template_of_clip():
    made = prompts.build("birdsnap", "en", ["Ruff"])
    assert made.texts == [["a photo of a Ruff, a type of bird."]]
    assert made.source == "CLIP, 1 templates"


def test_chinese_and_xtd_captions_are_read_as_their_makers_have_them(tmp_path):
    names = [f"COCO_{split}2014_000000000{n:03d}" for n, split in enumerate(("val", "train"))]
    for name in names:
        path = tmp_path / "coco" / name.split("_")[1] / f"{name}.jpg"
        path.parent.mkdir(parents=True)
        Image.fromarray(_scene(PAIRS[0])).save(path)
    for folder in ("coco-cn", "xtd/XTD10", "xtd/STAIR"):
        (tmp_path / folder).mkdir(parents=True)
    other = "COCO_train2014_000000000009"
    lines = [f"{name}#zhm#{n}\t句{n}" for name in (*names, other) for n in range(2)]
    file = tmp_path / "coco-cn/imageid.human-written-caption.txt"
    file.write_text("\n".join(lines), "utf-8")
    (tmp_path / "coco-cn/coco-cn_test.txt").write_text("\n".join(names[::-1]))
    pictures, captions = datasets.captioned("coco-cn", "retrieval", tmp_path, "zh", 8, True)
    assert captions == [["句0", "句1"]] * 2 and pictures[:].shape == (2, 8, 8, 3)
    assert [place.path.stem for place in pictures.places] == names[::-1]
    file.write_text("\n".join(lines[:2]), "utf-8")
    with pytest.raises(files.DatasetError, match=f"no caption of 1 pictures: {names[1]}.jpg"):
        datasets.captioned("coco-cn", "retrieval", tmp_path, "zh", 8, True)
    listed = "\n".join(f"{name}.jpg" for name in names)
    (tmp_path / "xtd/XTD10/test_image_names.txt").write_text(listed)
    (tmp_path / "xtd/STAIR/test_1kcaptions_jp.txt").write_text("一\n二\n", "utf-8")
    pictures, captions = datasets.captioned("xtd", "retrieval", tmp_path, "ja", 8, True)
    assert captions == [["一"], ["二"]] and len(pictures[:]) == 2


def _retrieval_files(root):
    """Flickr30K in Karpathy's JSON and in Chinese lines, XTD, and COCO-CN: the same pictures."""
    for folder in ("flickr30k/Images", "xtd/images", "coco-cn/images"):
        (root / folder).mkdir(parents=True)
        for pair in PAIRS:
            Image.fromarray(_scene(pair)).save(root / folder / f"{'-'.join(pair)}.jpg", quality=98)
    captions = {
        language: {
            "-".join(pair): text.scene_captions(((((*pair, "large")),), None), language)[:2]
            for pair in PAIRS
        }
        for language in ("en", "zh", "es")
    }
    images = [
        {"filename": f"{n}.jpg", "split": "test", "sentences": [{"raw": c} for c in own]}
        for n, own in captions["en"].items()
    ]
    images.append({"filename": "no.jpg", "split": "train", "sentences": [{"raw": "no"}]})
    (root / "flickr30k/dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    lines = [f"{n}.jpg,{c}, 好" for n, own in captions["zh"].items() for c in own]
    (root / "flickr30k/flickr30k_test_zh.txt").write_text("\n".join(["image,caption", *lines]))
    lines = [f"{n}#zhm#0\t{own[0]}" for n, own in captions["zh"].items()]
    (root / "coco-cn/coco-cn_test.txt").write_text("\n".join(lines))
    names = "\n".join(f"{n}.jpg" for n in captions["en"])
    (root / "xtd/test_image_names.txt").write_text(names)
    for language in ("en", "es"):
        own = "\n".join(c[0] for c in captions[language].values())
        (root / f"xtd/test_1kcaptions_{language}.txt").write_text(own)


def test_retrieval_of_published_layouts(tmp_path, figures):
    _retrieval_files(tmp_path)
    options = dict(root=str(tmp_path), partial=True, modes=["c"], languages=["en"])
    trained, untrained = figures("retrieval", datasets=["flickr30k"], **options)
    assert trained["flickr30k.c.en.i2t_r1"] >= 0.8 > untrained["flickr30k.c.en.i2t_r1"]
    assert trained["flickr30k.c.en.t2i_r5"] == 1.0
    others = (("flickr30k-cn", "zh", 2), ("coco-cn", "zh", 1), ("xtd", "es", 1))
    for name, language, count in others:
        pictures, captions = datasets.captioned(
            name, "retrieval", tmp_path, language, 48, partial=True
        )
        assert pictures[2:5].shape == (3, 48, 48, 3)
        assert [len(own) for own in captions] == [count] * 6
    (tmp_path / "xtd/test_1kcaptions_es.txt").write_text("una\n")
    with pytest.raises(files.DatasetError, match=r"6 lines but .* has 1"):
        datasets.captioned("xtd", "retrieval", tmp_path, "es", 48)
    next((tmp_path / "coco-cn/images").iterdir()).unlink()
    with pytest.raises(files.DatasetError, match="1 of 6 picture files are missing"):
        datasets.captioned("coco-cn", "retrieval", tmp_path, "zh", 48)


@pytest.mark.slow
def test_several_captions_and_matching(figures):
    trained, untrained = figures(
        "retrieval", languages=["en"], count=40, captions_per_image=2, rerank=5, modes=["g"]
    )
    for way in ("i2t_r1", "t2i_r1"):
        assert trained[f"g.en.{way}"] >= 0.85 > untrained[f"g.en.{way}"]
        assert trained[f"itm.en.{way}"] >= 0.7 > untrained[f"itm.en.{way}"]


def test_frames_lie_in_the_middle_of_equal_intervals():
    assert video.sampled(range(8), 1) == [4]
    assert video.sampled(range(32), 8) == [2, 6, 10, 14, 18, 22, 26, 30]
    assert video.sampled(range(3), 4) == [0, 1, 2, 2]


@pytest.mark.slow
def test_moving_objects_are_classified_and_retrieved(figures):
    trained, untrained = figures("video", modes=["c"], dual_softmax=True)
    for name in ("embedded.en.1f.top1", "embedded.en.8f.top1", "embedded.c.en.8f.t2v_r1"):
        assert trained[name] >= 0.7 > 0.2 > untrained[name]


def test_msrvtt_and_kinetics_are_read_from_frames(tmp_path, demo):
    rows = []
    for pair in PAIRS[:3]:
        for folder in (tmp_path / "msrvtt/frames" / pair[1], tmp_path / "k400" / pair[1] / "v0"):
            folder.mkdir(parents=True, exist_ok=True)
            for frame in range(3):
                Image.fromarray(_scene(pair)).save(folder / f"{frame:03d}.png")
        rows.append({"key": "k", "video_id": pair[1], "sentence": f"a {pair[0]} {pair[1]}"})
    with open(tmp_path / "msrvtt/MSRVTT_JSFUSION_test.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["key", "video_id", "sentence"])
        writer.writeheader()
        writer.writerows(rows)
    options = dict(datasets=["msrvtt", "k400"], root=str(tmp_path), frames=[1], modes=["c"])
    one = evaluator.build({"video": options | {"partial": True}}, demo.experiment)["video"]
    found = dict(one.run(demo.config, demo.params))
    assert found["msrvtt.c.en.1f.v2t_r1"] >= 2 / 3 and found["k400.en.1f.top1"] >= 2 / 3
    one = evaluator.build({"video": options}, demo.experiment)["video"]
    with pytest.raises(files.DatasetError, match="3 images where the protocol has 1000"):
        dict(one.run(demo.config, demo.params))
