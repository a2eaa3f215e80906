#!/bin/sh
# A row of each paper in miniature, on CIFAR-100: results/recipes_cifar100/make.sh cifar100.npz
# Run again to go on after an interrupt. Song et al. print ImageNet only; its networks are trained on CIFAR-100 here.
set -e
run() { fastkdtf run "$@" --scale .03 --seeds 2 --device cpu --out "$(dirname "$0")"; }
run yuan2019/T8/ShuffleNetV2/TfKD_reg --path "$1"
run wang2020/T1/ResNet20/MrKD3 --path "$1"
run zheng2022/T1/cifar100/ResNet-32/SelfGuidance --path "$1"
run 'song2023/T4a/MobileNet V3-Small 0.75/EffDstl/from MobileNet V2 > MobileNet V3-Large' --data cifar100 --path "$1"
