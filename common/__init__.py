"""What all commands share. Importing it silences what libraries log while they are only being imported.

transformers and PEFT import torchao and bitsandbytes wherever they are installed. These then log each kernel that cannot be
loaded, and PyTorch logs how torchao registers its types. A command that quantises still gets an error if it needs such a
kernel.
"""

import logging

for _name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
