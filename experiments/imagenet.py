"""Trains one network on ImageNet, read and decoded while it trains.

    python -m experiments.imagenet --model=resnet50 --method=ssa --precision=bfloat16 --workers=16

`--dataset=tiny_imagenet10` and `--dataset=imagenet_sample1k` are small samples of it, to try the
whole path. `--help` lists every flag; results are those of `experiments.cifar`.
"""

from experiments import cifar

DEFAULTS = {
    "dataset": "imagenet2012",
    "model": "resnet18",
    "epochs": 90,
    "batch_size": 256,
    "label_smoothing": 0.1,
}

if __name__ == "__main__":
    cifar.program(DEFAULTS)
