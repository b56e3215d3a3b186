"""An Intel 8254x network card as a vfio-user device, and the cable between two of them."""
