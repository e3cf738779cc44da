"""Views: a batch of uint8 images becomes normalized float views, on any device."""

from self_supervised.views.augmentations import training_views as training_views
