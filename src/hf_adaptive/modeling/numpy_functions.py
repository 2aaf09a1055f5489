"""The few functions of torch that criteria are written in, under the same names, for numpy arrays.

A runtime without torch decides with them when a row leaves, by the same lines of code.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


class NumpyFunctions:
    """Named, called and behaving as torch's; `dim` is numpy's `axis`.

    What is asked at every exit reduces by the ufuncs themselves: for a single row the methods of arrays, which do the
    same through functions in Python, take longer than the numbers.
    """

    bool = np.bool_

    @staticmethod
    def softmax(array: np.ndarray, dim: int) -> np.ndarray:
        """Probabilities along a dimension."""
        powers = np.exp(array - np.maximum.reduce(array, axis=dim, keepdims=True))
        return powers / np.add.reduce(powers, axis=dim, keepdims=True)

    @staticmethod
    def log_softmax(array: np.ndarray, dim: int) -> np.ndarray:
        """Logarithms of the probabilities along a dimension."""
        shifted = array - array.max(axis=dim, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=dim, keepdims=True))

    @staticmethod
    def sigmoid(array: np.ndarray) -> np.ndarray:
        """Probabilities of yes/no answers."""
        with np.errstate(invalid="ignore"):  # NaN stays NaN
            return np.exp(-np.logaddexp(0, -array)).astype(array.dtype)

    @staticmethod
    def amax(array: np.ndarray, dim: int) -> np.ndarray:
        """Largest value along a dimension; NaN if there is one."""
        return np.maximum.reduce(array, axis=dim)

    @staticmethod
    def amin(array: np.ndarray, dim: int) -> np.ndarray:
        """Least value along a dimension; NaN if there is one."""
        return array.min(axis=dim)

    @staticmethod
    def argmax(array: np.ndarray, dim: int) -> np.ndarray:
        """Where the largest value stands along a dimension."""
        return array.argmax(axis=dim)

    @staticmethod
    def exp(array: np.ndarray) -> np.ndarray:
        """e to the power of each value."""
        return np.exp(array)

    @staticmethod
    def sum(array: np.ndarray, dim: int) -> np.ndarray:
        """Sum along a dimension."""
        return array.sum(axis=dim)

    @staticmethod
    def cumprod(array: np.ndarray, dim: int) -> np.ndarray:
        """Products of ever more values along a dimension."""
        return array.cumprod(axis=dim)

    @staticmethod
    def flip(array: np.ndarray, dims: Sequence[int]) -> np.ndarray:
        """Turned around along some dimensions."""
        return np.flip(array, axis=tuple(dims))

    @staticmethod
    def stack(arrays: Sequence[np.ndarray], dim: int) -> np.ndarray:
        """Side by side along a new dimension."""
        return np.stack(arrays, axis=dim)

    @staticmethod
    def clamp(array: np.ndarray, least: float, most: float) -> np.ndarray:
        """Kept between two values."""
        return array.clip(least, most)

    @staticmethod
    def any(array: np.ndarray, dim: int) -> np.ndarray:
        """Whether one along a dimension is true."""
        return np.asarray(np.logical_or.reduce(array, axis=dim))

    @staticmethod
    def all(array: np.ndarray, dim: int) -> np.ndarray:
        """Whether all along a dimension are true."""
        return np.asarray(array.all(axis=dim))

    @staticmethod
    def isnan(array: np.ndarray) -> np.ndarray:
        """Where a value is no number."""
        return np.isnan(array)

    @staticmethod
    def zeros_like(array: np.ndarray, dtype: Any = None) -> np.ndarray:
        """Zeros, or falsehoods, of the same shape."""
        return np.zeros_like(array, dtype=dtype)
