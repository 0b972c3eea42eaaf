#include "rewardops/cpu/logits_backward.h"
