"""A TSM-ResNet-18 from torchvision's: convert, take a training step, save, load. Runs on a GPU if there is one."""

import torch
import torchvision

import tsm_jit

N_SEGMENT, CLASSES = 8, 10
device = "cuda" if torch.cuda.is_available() else "cpu"


def tsm_resnet18() -> torch.nn.Module:
    net = torchvision.models.resnet18(num_classes=CLASSES)
    tsm_jit.make_temporal_shift(net, N_SEGMENT, inplace=True)
    return tsm_jit.VideoModel(net).to(device)  # clips in, the mean of the frames' scores out


net = tsm_resnet18()
optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
clips = torch.randn(2, N_SEGMENT, 3, 112, 112, device=device)
labels = torch.randint(0, CLASSES, (2,), device=device)

loss = torch.nn.functional.cross_entropy(net(clips), labels)
loss.backward()
optimizer.step()

again = tsm_resnet18()
again.load_state_dict(net.state_dict())  # the keys of TSM after `backbone.`: layer1.0.conv1.net.weight
net.eval(), again.eval()
with torch.inference_mode():
    assert torch.equal(again(clips), net(clips))
print(f"loss {loss.item():.3f} on {device}")
