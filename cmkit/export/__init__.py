"""A model as others open it: a pipeline of diffusers, a graph of ONNX or torch.export, or a run for
the Hugging Face Hub. Imports no torch."""

from cmkit.export.diffusers import quiet
from cmkit.export.writing import FORMS, export
