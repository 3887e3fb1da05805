"""Data sets of images as LightningDataModules, which also work without Lightning's Trainer."""

from wngen.data.array_file import ArrayFile
from wngen.data.binarized_mnist import BinarizedMNIST
from wngen.data.cifar10 import CIFAR10
from wngen.data.datamodule import ImageDataModule
from wngen.data.image_folder import ImageFolder
from wngen.data.images import Images, Split
from wngen.data.loader import EvaluationLoader, TrainingLoader
from wngen.data.mnist import MNIST, FashionMNIST

__all__ = [
    "CIFAR10",
    "MNIST",
    "ArrayFile",
    "BinarizedMNIST",
    "EvaluationLoader",
    "FashionMNIST",
    "ImageDataModule",
    "ImageFolder",
    "Images",
    "Split",
    "TrainingLoader",
]
