"""What every function stands on: rules, arguments, axes, devices, programs. Nothing of softmax."""
