#!/bin/sh
# A miniature of one row per paper, on CIFAR-100: results/recipes_cifar100/make.sh cifar100.npz
# Run again to go on after an interrupt.
set -e
run() { fastkdtf run "$@" --seeds 2 --device cpu --out "$(dirname "$0")"; }
run wang2020/T1/ResNet20/MrKD3 --path "$1" --scale .03
run yuan2019/T8/ShuffleNetV2/TfKD_reg --path "$1" --scale .015
run zheng2022/T1/cifar100/ResNet-32/SelfGuidance --path "$1" --scale .015
run 'song2023/T4a/MobileNet V3-Small 0.75/EffDstl/from MobileNet V2 > MobileNet V3-Large' --data cifar100 --path "$1" --scale .01
