"""Pointwise functions that are rare enough to be differentiated by their own nodes, and those without a derivative."""

from __future__ import annotations

from .structure import constant, pointwise, scaling, selection, stretching

pointwise(
    "AngleBackward0",
    "Atan2Backward0",
    "ErfinvBackward0",
    "HypotBackward0",
    "I0Backward0",
    "IgammaBackward0",  # PyTorch knows the derivative in the second argument only, as of zeta
    "IgammacBackward0",
    "LdexpBackward0",
    "LogaddexpBackward0",
    "Logaddexp2Backward0",
    "LogitBackward0",
    "MvlgammaBackward0",
    "SgnBackward0",
    "SincBackward0",
    "SpecialEntrBackward0",
    "SpecialErfcxBackward0",
    "SpecialI0EBackward0",
    "SpecialI1Backward0",
    "SpecialI1EBackward0",
    "SpecialLogNdtrBackward0",
    "SpecialNdtriBackward0",
    "SpecialXlog1PyBackward0",
    "SpecialXlog1PyBackward1",
    "SpecialXlog1PyBackward2",
    "SpecialZetaBackward0",
    "SpecialZetaBackward1",
    "XlogyBackward0",
    "XlogyBackward1",
    "XlogyBackward2",
)

# With slopes that are constant between kinks.
stretching("Deg2RadBackward0", "Rad2DegBackward0", "NanToNumBackward0", "FrexpBackward0")
scaling("CopysignBackward0", "CopysignBackward1", "FmodBackward1", "RemainderBackward1")
selection("FmodBackward0", "FracBackward0", "NextafterBackward0", "RemainderBackward0")

constant(
    "CeilBackward0",
    "FloorBackward0",
    "RoundBackward0",
    "RoundBackward1",
    "SignBackward0",
    "TruncBackward0",
)

# Fresh random values, or the outcome of a comparison, in place of x.
constant(
    "BernoulliBackward0",
    "BernoulliBackward1",
    "BernoulliBackward2",
    "CauchyBackward0",
    "ExponentialBackward0",
    "GeometricBackward0",
    "LogNormalBackward0",
    "NormalBackward0",
    "NormalBackward1",
    "NormalBackward2",
    "NormalBackward3",
    "PoissonBackward0",
    "RandomBackward0",
    "RandomBackward1",
    "RandomBackward2",
    "UniformBackward0",
    "EqBackward0",
    "EqBackward1",
    "GeBackward0",
    "GeBackward1",
    "GtBackward0",
    "GtBackward1",
    "LeBackward0",
    "LeBackward1",
    "LtBackward0",
    "LtBackward1",
    "NeBackward0",
    "NeBackward1",
)

# Quantisation in training: the node passes the gradient straight through where x was not clipped.
selection(
    "FakeQuantizePerChannelAffineCachemaskBackward0",
    "FakeQuantizePerTensorAffineCachemaskBackward0",
    "FakeQuantizePerTensorAffineCachemaskTensorQparamsBackward0",
    "FusedMovingAvgObsFqHelperBackward0",
)

# What autograd records of the first derivatives of activations (``create_graph=True``).
pointwise(
    "EluBackwardBackward0",
    "GeluBackwardBackward0",
    "HardshrinkBackwardBackward0",
    "HardswishBackwardBackward0",
    "HardtanhBackwardBackward0",
    "LeakyReluBackwardBackward0",
    "LogSigmoidBackwardBackward0",
    "NativeDropoutBackwardBackward0",
    "RreluWithNoiseBackwardBackward0",
    "SigmoidBackwardBackward0",
    "SoftplusBackwardBackward0",
    "SoftshrinkBackwardBackward0",
    "TanhBackwardBackward0",
    "ThresholdBackwardBackward0",
)
