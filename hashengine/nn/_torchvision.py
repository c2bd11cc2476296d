"""Torchvision's residual blocks, extended by attention at the end of the residual branch, before the addition."""

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck


class BasicBlockWithAttention(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        branch = self.relu(self.bn1(self.conv1(x)))
        branch = self.attention(self.bn2(self.conv2(branch)))
        branch += x if self.downsample is None else self.downsample(x)
        return self.relu(branch)


class BottleneckWithAttention(Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        branch = self.relu(self.bn1(self.conv1(x)))
        branch = self.relu(self.bn2(self.conv2(branch)))
        branch = self.attention(self.bn3(self.conv3(branch)))
        branch += x if self.downsample is None else self.downsample(x)
        return self.relu(branch)


WITH_ATTENTION: dict[type[nn.Module], type[nn.Module]] = {
    BasicBlock: BasicBlockWithAttention,
    Bottleneck: BottleneckWithAttention,
}
