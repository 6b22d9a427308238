"""mmsae: helpers behind the notebooks that study sparse autoencoders in multimodal models."""

import warnings

__version__ = "0.1.0"

# tqdm prints text where ipywidgets is not installed, as intended; it need not say so in every report
warnings.filterwarnings("ignore", message="IProgress not found")
