"Tiny tensors: threads only wait for each other, for minutes on a busy machine, and their number decides the last bits"
import torch

torch.set_num_threads(1)
