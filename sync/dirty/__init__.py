"""DMA dirty-page trackers: which pages of guest memory did the devices write."""
