"""Networks as teachers on 2,500 images of CIFAR-100: normal KD, Re-KD, De-KD and Tf-KD_self, each beside its control

    python results/cifar100_teachers/make.py CIFAR100.npz

Eight epochs of resnet14 for each student, three seeds. Run again to go on after an interrupt."""
import sys
from functools import partial
from pathlib import Path

from fastai.vision.all import *
from fastkdtf.all import *
from fastkdtf.lab.measure import keep_freed_memory

def train(dls, arch, n_epoch, file):
    "A trained network, or the one kept in `file`"
    set_seed(7)
    learn = Learner(dls, create_model(arch, dls.c), metrics=accuracy, path=file.parent, model_dir='.')
    if file.exists(): return learn.load(file.stem)
    with learn.no_bar(): learn.fit_one_cycle(n_epoch, lr)
    learn.save(file.stem, with_opt=False)
    return learn

lr,seeds,n_epoch = 1e-2,3,8
out = Path(__file__).parent
trained = out/'trained'
trained.mkdir(exist_ok=True)
keep_freed_memory()
dls = kd_dataloaders(sys.argv[1], bs=64, train_subset=2500, augment=Augment(flip=True, pad=4))
student = Learner(dls, create_model('resnet14', dls.c), metrics=accuracy)
settings = dict(n_epoch=n_epoch, seeds=seeds, lr=lr, model_fn=partial(create_model, 'resnet14', dls.c), out=out)

weak = train(dls, 'resnet8', 2, trained/'weak.pth')
student.reversed_kd(weak, **settings)
student.fit_tf_kd_self(**settings)
poor = student.poor_teachers(n_epoch, at_epochs=[1, 3], lr=lr, seed=7, model_fn=settings['model_fn'], out=trained/'poor')
strong = train(dls, 'resnet26_basic', 16, trained/'strong.pth')
teachers = {'KD from resnet26': NetworkTeacher(strong), **{f'De-KD epoch {o.epoch}': o for o in poor}}
student.defective_kd(teachers, **settings)

everything = Taught(read_runs(out))
write_report(everything, everything.save(out))
