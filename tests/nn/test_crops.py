import torch

from fastssl.nn import DINOHead
from fastssl.nn.crops import MultiCropNetwork, encode_crops


def test_views_of_one_size_in_a_row_share_a_call():
    calls = []

    def encoder(images):
        calls.append(tuple(images.shape))
        return images.mean((2, 3))

    sizes = [(8, 8), (8, 8), (4, 4), (4, 4), (4, 4), (8, 8)]
    views = [torch.randn(2, 3, *size) for size in sizes]
    features = encode_crops(encoder, views)
    assert calls == [(4, 3, 8, 8), (6, 3, 4, 4), (2, 3, 8, 8)]
    torch.testing.assert_close(features, torch.cat([view.mean((2, 3)) for view in views]))


def test_the_rows_of_a_network_are_those_of_its_views():
    head = DINOHead(3, 7, hidden_dim=5, bottleneck_dim=4)
    network = MultiCropNetwork(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()), head)
    views = [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4)]
    features, prototypes = network(views)
    assert features.shape == (4, 4) and prototypes.shape == (7, 4)
    torch.testing.assert_close(features[2:] @ prototypes.T, head(views[1].mean((2, 3))))
