"""Learned hashing: capture queries and keys, label them, train hash maps, save and load them."""

from hashattn.hashing.capture import CapturedLayer, capture
from hashattn.hashing.maps import HashConfig, HashMap, LayerMaps
from hashattn.hashing.recipe import TrainRecipe
from hashattn.hashing.renew import renew_card, renew_slopes
from hashattn.hashing.train import train_hash_weights
from hashattn.hashing.transform import calibrate_transform
from hashattn.hashing.weights import HashWeights

__all__ = [
    "CapturedLayer",
    "HashConfig",
    "HashMap",
    "HashWeights",
    "LayerMaps",
    "TrainRecipe",
    "calibrate_transform",
    "capture",
    "renew_card",
    "renew_slopes",
    "train_hash_weights",
]
