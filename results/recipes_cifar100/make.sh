#!/bin/sh
# Miniatures of rows of two papers, on CIFAR-100: results/recipes_cifar100/make.sh cifar100.npz
# Run again to go on after an interrupt.
set -e
run() { fastkdtf run "$@" --device cpu --out "$(dirname "$0")"; }
run wang2020/T1/ResNet20/MrKD3 --path "$1" --scale .03 --seeds 2
run zheng2022/T1/cifar100/ResNet-32/SelfGuidance --path "$1" --scale .01 --seeds 1
